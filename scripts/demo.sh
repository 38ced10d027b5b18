#!/usr/bin/env bash
# Sets everything up and trains a VAE on handwritten digits. Arguments go to `fusedvae train`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

say "fusedvae info"
fusedvae info
say "fusedvae train $*"
exec fusedvae train "$@"

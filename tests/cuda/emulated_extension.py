"""A pytest plugin: the extension at FUSEDVAE_EMULATED_EXTENSION, whose kernels are emulated, serves the tests."""

import importlib.util
import os
import sys

import torch  # noqa: F401 - before the extension, as in fusedvae.backend.native

spec = importlib.util.spec_from_file_location("fusedvae._C", os.environ["FUSEDVAE_EMULATED_EXTENSION"])
assert spec is not None
assert spec.loader is not None
sys.modules["fusedvae._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fusedvae._C"])

"""What the kernels are told in numbers: the host packs them, and the kernels take them apart when they are compiled."""

# The axes of an operand: the dimensions that it varies along.
BATCH, OUTER, INNER = 1, 2, 4
ALL = BATCH | OUTER | INNER
ABSENT = 8
"""The axes of an operand that was not given, and the slot of an output that shares its sums with no other tile."""

# How tiles lie.
WIDE = 1
"""Offsets or indices might not fit 32 bits."""
FLAT = 2
"""Batch and outer are 1, so that all operands are gone through in one line."""
WHOLE = 4
"""No tile reaches past the extent, so that no access needs a mask."""

# A form: how a scale is made of an input. Its map is as `reference.Form` has it, or LOG where the logarithm that the
# formula is written in comes without a detour (e^x, nothing added).
LOG, EXPONENTIAL, LINEAR, SOFTPLUS, BOUNDED = range(5)
MAP = 7
"""Which bits of a form are its map."""
SQUARED = 8
"""That of a deviation, where the scale is a variance."""
ROUGH = 16
"""What comes of a logarithm beside a sample is rounded to bfloat16, which keeps 8 bits: some 20 are enough then, and
the chip's own functions have them."""

# The bounds of an input.
BELOW, ABOVE = 1, 2

# The operands whose axes the kernels are told, four bits each, in this order.
MOST_INPUTS = 4
"""What a formula takes at most."""
INPUTS = tuple([f"in{k}" for k in range(MOST_INPUTS)])
GRADS = tuple([f"g{k}" for k in range(MOST_INPUTS)])
SUMMED = ("value", *GRADS)
"""The outputs that may be summed over axes; each has a slot among the sums that tiles share, in this order, too."""
_AXES = (*INPUTS, "incoming", *SUMMED)
TERM_AXES = (*_AXES, "weight")
LATENT_AXES = (*_AXES, "noise", "grad_z")

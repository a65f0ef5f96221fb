"""Codes: the corrections of inverses that round. Prediction and code together determine the value, bit for bit.

Forward: `code = encode(x, prediction, width)`; the prediction is the result of the inverse. Backward: `x, _ =
decode(prediction, code)`. Any prediction will do (NaN, inf, -0, another sign). If a nondeterministic kernel predicts
another value in the backward, x is off by the same rounding error, no more.

Three implementations give the same bytes, except for the order of escapes. Operators of torch (`aten.py`) run
everywhere. C runs on CPUs, if there was a compiler when revfx was installed. Triton runs on accelerators, if it is
installed. The environment variable `REVFX_CODES` (aten, c or triton) chooses another one. See `format.py` for the
format.

After the "bits" by which MacKay et al. (2018, https://arxiv.org/abs/1810.10999) and Maclaurin et al. (2015,
https://arxiv.org/abs/1502.03492) make fixed-point arithmetic reversible; here the arithmetic is the model's own.
"""

from __future__ import annotations

from revfx.codes.codec import Codec
from revfx.codes.format import WIDTHS, Code, Prediction, predict
from revfx.codes.implementations import (
    count_escapes,
    decode,
    encode,
    fingerprint,
    implementation,
    pack_marks,
    unpack_marks,
)


__all__ = [
    "WIDTHS", "Code", "Codec", "Prediction", "count_escapes", "decode", "encode", "fingerprint", "implementation",
    "pack_marks", "predict", "unpack_marks",
]  # fmt: skip

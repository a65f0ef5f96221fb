"""Codes: the corrections of inverses that round, so that prediction and code together are the value, bit for bit.

Forward: `code = encode(x, prediction, width)`, where the prediction is the result of the inverse; backward: `x, _ =
decode(prediction, code)`. x comes back from any prediction (NaN, inf, -0, another sign); and where
the prediction was made by a kernel that does not round alike every time, an element is off by rounding, no more.

Three implementations make the same bytes, but for the order of escapes: operators of torch (`aten.py`), which run
everywhere; C on CPUs, if there was a compiler when revfx was installed; Triton on accelerators, where it is installed.
The environment variable `REVFX_CODES` (aten, c or triton) chooses another one. See `format.py` for the format.

After the "bits" by which MacKay et al. (2018, https://arxiv.org/abs/1810.10999) and Maclaurin et al. (2015,
https://arxiv.org/abs/1502.03492) make fixed-point arithmetic reversible; here the arithmetic is the model's own.
"""

from __future__ import annotations

from revfx.codes.codec import Codec
from revfx.codes.format import WIDTHS, Code, Prediction, predict
from revfx.codes.implementations import count_escapes, decode, encode, fingerprint, implementation


__all__ = [
    "WIDTHS", "Code", "Codec", "Prediction", "count_escapes", "decode", "encode", "fingerprint", "implementation",
    "predict",
]  # fmt: skip

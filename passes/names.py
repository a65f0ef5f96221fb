"""What operations of which name do to the numbers that they take: the tables by which graphs are read."""

from __future__ import annotations

from typing import Any


MAKERS = frozenset(
    """relu relu6 leaky_relu prelu rrelu threshold hardtanh hardswish hardsigmoid clamp clamp_min clamp_max clip max
    min maximum minimum amax amin fmax fmin where abs absolute sign sgn round floor ceil trunc fix frac heaviside
    softshrink hardshrink max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d max_unpool2d
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout eq ne lt le gt ge masked_fill
    masked_select masked_scatter one_hot zeros zeros_like ones ones_like full full_like tril triu embedding nan_to_num
    topk sort cummax cummin quantile median mode pad bernoulli native_dropout max_pool2d_with_indices
    max_pool3d_with_indices constant_pad_nd zero full_like new_zeros new_full floor_divide floordiv __floordiv__
    trunc_divide bucketize searchsorted count_nonzero argmax argmin logical_and logical_or logical_xor logical_not
    isnan isinf isfinite empty empty_like new_empty arange eye diag_embed diag block_diag scatter index_put
    empty_strided new_empty_strided unsafe_index_put unsafe_masked_index as_strided_scatter diagonal_scatter
    new_ones scalar_tensor fake_quantize_per_tensor_affine fake_quantize_per_channel_affine
    quantize_per_tensor""".split()
)
MIXERS = frozenset(
    """linear matmul mm bmm addmm baddbmm einsum conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    bilinear addmv convolution native_layer_norm native_group_norm _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    inductor_random layer_norm group_norm instance_norm rms_norm scaled_dot_product_attention
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps
    _efficient_attention_forward _flash_attention_forward _fused_rms_norm _thnn_fused_lstm_cell _cudnn_rnn
    mkldnn_rnn_layer _scaled_mm _grouped_mm multi_head_attention_forward rand randn randn_like rand_like normal lstm
    gru rnn_tanh tensordot outer mv dot""".split()
)
PICKS = frozenset("getitem __getitem__ index _unsafe_index index_select gather take take_along_dim".split())
SUMS = frozenset("add sub subtract rsub lerp __rsub__ __add__ __radd__ __sub__ __iadd__ __isub__ iadd isub".split())
SUMS_WITH_PRODUCT = frozenset("addcmul addcdiv".split())
PRODUCTS = frozenset(
    """mul multiply div divide true_divide truediv imul itruediv __mul__ __imul__ __rmul__ __rdiv__ __truediv__
    __itruediv__""".split()
)
JOINS = frozenset("cat concat concatenate stack hstack vstack dstack slice_scatter select_scatter".split())
# Strictly monotone or analytic almost everywhere, reductions over many numbers, and moves of elements: they make none.
SMOOTH = frozenset(
    """exp exp2 expm1 log log2 log10 log1p logit sin cos tan sinh cosh tanh asin acos atan atan2 asinh acosh atanh sinc
    sigmoid log_sigmoid logsigmoid softplus softsign gelu silu mish elu celu selu glu tanhshrink erf erfc erfinv
    lgamma digamma softmax _softmax log_softmax _log_softmax softmin logsumexp sqrt rsqrt reciprocal square pow
    __pow__ __rpow__ float_power neg negative __neg__ positive hypot sum mean var std var_mean std_mean norm
    vector_norm linalg_norm linalg_vector_norm cumsum prod cumprod logcumsumexp cosine_similarity normalize
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d interpolate upsample_bilinear2d upsample_bicubic2d grid_sample
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d
    batch_norm native_batch_norm _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
    local_response_norm complex real imag view_as_real view_as_complex polar angle conj fft rfft irfft ifft fft2
    ifft2 rfft2 irfft2 cdist dist cross outer kron trace det inverse addr to _to_copy convert_element_type float
    double half bfloat16 type type_as cpu cuda clone contiguous detach alias lift_fresh_copy requires_grad_ __get__
    getattr data view _unsafe_view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze expand
    expand_as broadcast_to repeat repeat_interleave tile permute transpose swapaxes swapdims movedim moveaxis t T mT
    flip fliplr flipud rot90 rev roll pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle chunk
    split split_with_sizes tensor_split unsafe_split unsafe_chunk unbind narrow select slice diagonal unfold
    as_strided meshgrid broadcast_tensors Identity""".split()
)
SAME = frozenset("detach alias clone contiguous lift_fresh_copy data positive".split())
# What is the first operand where the others are zero; where nothing is written into it; what is a part of it.
BETWEEN = SUMS_WITH_PRODUCT | frozenset(["lerp"])
WRITES = frozenset(
    """masked_fill masked_scatter slice_scatter select_scatter diagonal_scatter as_strided_scatter scatter scatter_add
    scatter_reduce index_put _unsafe_index_put index_add index_copy index_fill setitem""".split()
)
TAKES = frozenset(
    """getitem __getitem__ slice narrow select split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk
    unbind""".split()
)
# Of which the result is told by its shape.
RESHAPES = frozenset("view _unsafe_view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze".split())
OTHER_MOVES = frozenset(
    """expand expand_as broadcast_to repeat repeat_interleave tile permute transpose swapaxes swapdims movedim moveaxis
    t T mT flip fliplr flipud rot90 rev roll pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    diagonal unfold as_strided index _unsafe_index index_select gather take take_along_dim getattr""".split()
)
MOVES = TAKES | RESHAPES | OTHER_MOVES
COMMUTE = frozenset("add mul multiply __add__ __radd__ __mul__ __rmul__ maximum minimum".split())
# Other words for an operation on one tensor, but for a factor and where it stops.
SPELLINGS = {
    word: name
    for name, words in {
        "pow": "square __pow__ float_power",
        "max": "amax",
        "min": "amin",
        "sum": "mean",
        "clamp": "relu relu6 clip clamp_min clamp_max hardtanh threshold",
        "norm": "vector_norm linalg_norm linalg_vector_norm",
        "softmax": "_softmax",
        "log_softmax": "_log_softmax",
    }.items()
    for word in words.split()
}
# What gives elements of one operand or another, or something between.
CHOICES = frozenset("where lerp maximum minimum fmax fmin".split())


def bare(name: str) -> str:
    """Return the name of an operation, without what marks it as one in place."""
    return name if name.endswith("__") else name.rstrip("_")


def factor(name: str, args: tuple[Any, ...]) -> float | None:
    """Return the number that an operation multiplies its only tensor by; None: it does something else."""
    if name in SAME or name == "getattr":
        return 1.0 if name != "getattr" or args[1:] == ("data",) else None
    if name in ("neg", "negative", "__neg__"):
        return -1.0
    numbers = [float(x) for x in args[:2] if isinstance(x, (int, float))]
    if name in PRODUCTS and len(args) == 2 and len(numbers) == 1 and numbers[0]:
        inverse = "div" in name
        return None if name == "__rdiv__" else 1 / numbers[0] if inverse else numbers[0]
    return None


def updated_statistics(name: str, args: Any, kwargs: Any) -> list[Any]:
    """Return the running statistics that a call of `batch_norm` or `instance_norm` is given and writes to."""
    if name not in ("batch_norm", "instance_norm"):
        return []
    flag = "training" if name == "batch_norm" else "use_input_stats"
    names = ("input", "running_mean", "running_var", "weight", "bias", flag)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    statistics = [given.get("running_mean"), given.get("running_var")]
    return [x for x in statistics if x is not None] if given.get(flag, name == "instance_norm") else []

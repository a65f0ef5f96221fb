"""What operations of which name do to the numbers that they take: the tables by which graphs are read."""

from __future__ import annotations

from typing import Any


def _words(text: str) -> frozenset[str]:
    """Return the names in a text, in which `conv#d` stands for `conv1d`, `conv2d` and `conv3d`."""
    return frozenset(word.replace("#", d) for word in text.split() for d in "123")


# --- names that stand in several tables
_NORM = "norm vector_norm linalg_norm linalg_vector_norm"
_BATCH_NORM = """batch_norm native_batch_norm _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training"""
_LAYER_NORM = "layer_norm native_layer_norm group_norm native_group_norm instance_norm"
_RECTIFIED = "relu leaky_relu prelu rrelu abs absolute"
_SIGNS = "sign sgn heaviside logical_and logical_or logical_xor logical_not count_nonzero"
_COMPARED = "eq ne lt le gt ge clamp clamp_min clamp_max clip threshold"
_OF_SHAPES = """zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty empty_strided
    new_empty_strided"""
_PUT = f"""{_OF_SHAPES} dropout dropout#d alpha_dropout feature_alpha_dropout native_dropout where masked_fill
    masked_select masked_scatter zeros ones full empty tril triu pad constant_pad_nd zero diag diag_embed block_diag
    scatter index_put embedding nan_to_num isnan isinf isfinite scalar_tensor as_strided_scatter diagonal_scatter"""
_CURVED = f"""{_NORM} exp exp2 log log2 log10 logit cos cosh acos acosh atan2 sinc sigmoid log_sigmoid logsigmoid
    softplus glu erfc lgamma digamma softmax _softmax log_softmax _log_softmax softmin logsumexp rsqrt reciprocal
    __rpow__ float_power hypot var std var_mean std_mean prod cumprod logcumsumexp cosine_similarity normalize
    local_response_norm cdist dist det inverse"""
_ADDED_UP = """sum mean cumsum avg_pool#d adaptive_avg_pool#d _adaptive_avg_pool2d _adaptive_avg_pool3d interpolate
    upsample_bilinear2d upsample_bicubic2d grid_sample fft rfft irfft ifft fft2 ifft2 rfft2 irfft2 cross kron trace
    addr"""
_ATTENTION = """scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps
    _efficient_attention_forward _flash_attention_forward"""
_DRAWN = "rand randn rand_like randn_like normal inductor_random"
_SCALED = "rms_norm _fused_rms_norm"
_REPEATED = "expand expand_as broadcast_to repeat repeat_interleave tile"
_RESAMPLED = """broadcast_tensors interpolate upsample_nearest#d _upsample_nearest_exact#d reflection_pad#d
    replication_pad#d"""
_TAKEN = "slice narrow select split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk unbind"
_RESHAPED = "view _unsafe_view view_as reshape reshape_as flatten unflatten ravel squeeze unsqueeze"
_TURNED = f"""{_REPEATED} permute transpose swapaxes swapdims movedim moveaxis t T mT flip fliplr flipud rot90 rev roll
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle diagonal unfold as_strided getattr"""
_SAME = "detach alias clone contiguous lift_fresh_copy data positive"

# --- where operations jump or bend: at zero; at whole coordinates, where points are the same, where all numbers are
AT_ZERO = _words(
    f"""{_RECTIFIED} {_NORM} elu celu selu sqrt rsqrt reciprocal hypot normalize cosine_similarity lp_pool1d lp_pool2d
    xlogy xlog1py entr"""
)
ELSEWHERE = _words("grid_sample grid_sampler_2d cdist pdist dist pairwise_distance std std_mean")
SIGNS, COMPARED = _words(_SIGNS), _words(_COMPARED)
SINGLY = (AT_ZERO | SIGNS | COMPARED) - _words(_NORM)  # for each element by itself
NOWHERE = _words(f"{_PUT} _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate copy")
# What reads of a value no more than its shape.
SHAPED = _words(f"{_OF_SHAPES} sym_size sym_stride sym_numel sym_storage_offset size stride numel dim")

# --- what makes numbers, what mixes them, and what keeps them apart
MAKERS = _words(
    f"""{_PUT} {_RECTIFIED} {_SIGNS} {_COMPARED} relu6 hardtanh hardswish hardsigmoid max min maximum minimum amax amin
    fmax fmin round floor ceil trunc fix frac softshrink hardshrink max_pool#d adaptive_max_pool1d adaptive_max_pool2d
    max_unpool2d max_pool2d_with_indices max_pool3d_with_indices one_hot topk sort cummax cummin quantile median mode
    bernoulli arange eye floor_divide floordiv __floordiv__ trunc_divide bucketize searchsorted argmax argmin
    unsafe_index_put unsafe_masked_index fake_quantize_per_tensor_affine fake_quantize_per_channel_affine
    quantize_per_tensor"""
)
ZEROS = _words("zeros zeros_like new_zeros")
# What fills places with a number that it is given.
FILLS = _words(
    """where masked_fill full full_like new_full pad constant_pad_nd scatter index_put nan_to_num index_fill
    scalar_tensor _unsafe_index_put _unsafe_masked_index"""
)
ATTENTION, DRAWN, SCALES = _words(_ATTENTION), _words(_DRAWN), _words(_SCALED)
MIXERS = _words(
    f"""{_ATTENTION} {_DRAWN} {_SCALED} {_LAYER_NORM} linear matmul mm bmm addmm baddbmm einsum conv#d conv_transpose#d
    bilinear addmv convolution _thnn_fused_lstm_cell _cudnn_rnn mkldnn_rnn_layer _scaled_mm _grouped_mm
    multi_head_attention_forward lstm gru rnn_tanh tensordot outer mv dot"""
)
# Zero where an element is the mean of its group, as all of a constant row or channel are.
NORMS = _words(f"{_BATCH_NORM} {_LAYER_NORM} _native_batch_norm_legit cudnn_batch_norm miopen_batch_norm")
SUMS = _words("add sub subtract rsub lerp __rsub__ __add__ __radd__ __sub__ __iadd__ __isub__ iadd isub")
SUMS_WITH_PRODUCT = _words("addcmul addcdiv")
PRODUCTS = _words(
    """mul multiply div divide true_divide truediv imul itruediv __mul__ __imul__ __rmul__ __rdiv__ __truediv__
    __itruediv__"""
)
JOINS = _words("cat concat concatenate stack hstack vstack dstack slice_scatter select_scatter")
# What is zero elsewhere than its operand, and what adds up several numbers of it (attention: a weighted mean).
MOVES_NUMBERS = _words(
    f"""{_CURVED} erfcx polygamma mvlgamma _safe_softmax logaddexp logaddexp2 pairwise_distance pdist logdet slogdet inv
    pinv matrix_exp matrix_power cholesky eigh svd qr solve solve_triangular lstsq cov corrcoef mse_loss cross_entropy
    nll_loss kl_div binary_cross_entropy binary_cross_entropy_with_logits gaussian_nll_loss i0 i0e i1 i1e ndtr log_ndtr
    xlogy xlog1py entr"""
)
ADDS_UP = _words(
    f"""{_ATTENTION} {_ADDED_UP} nansum nanmean diff trapezoid trapz cumulative_trapezoid gradient lp_pool1d lp_pool2d
    upsample upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa grid_sampler_2d fold im2col col2im
    scatter_add index_add fftn ifftn rfftn irfftn hfft ihfft _fft_r2c _fft_c2r _fft_c2c stft istft linalg_cross inner
    vdot vecdot addbmm chain_matmul multi_dot linalg_multi_dot all_reduce reduce_scatter_tensor embedding_bag
    _embedding_bag"""
)
# Strictly monotone or analytic almost everywhere, reductions over many numbers, and moves of elements: they make none.
SMOOTH = _words(
    f"""{_CURVED} {_ADDED_UP} {_RESAMPLED} {_BATCH_NORM} {_TAKEN} {_RESHAPED} {_TURNED} {_SAME} expm1 log1p sin tan sinh
    tanh asin atan asinh atanh softsign gelu silu mish elu celu selu tanhshrink erf erfinv sqrt square pow __pow__ neg
    negative __neg__ complex real imag view_as_real view_as_complex polar angle conj outer to _to_copy
    convert_element_type float double half bfloat16 type type_as cpu cuda requires_grad_ __get__ meshgrid Identity"""
)

# --- what moves elements
SAME = _words(_SAME)
PICKS = _words("getitem __getitem__ index _unsafe_index index_select gather take take_along_dim")
TAKES = _words(f"{_TAKEN} getitem __getitem__")
RESHAPES = _words(_RESHAPED)  # of which the result is told by its shape
MOVES = PICKS | TAKES | RESHAPES | _words(_TURNED)
REPEATS = _words(f"{_REPEATED} {_RESAMPLED} expand_copy broadcast upsample upsample_nearest")
TURNS = _words(
    """adjoint mH H hsplit vsplit dsplit atleast_1d atleast_2d atleast_3d column_stack row_stack narrow_copy
    wait_tensor all_gather_into_tensor all_to_all_single broadcast index_copy index_fill fftshift ifftshift deg2rad
    rad2deg vander cartesian_prod combinations unsafe_split view_copy expand_copy permute_copy transpose_copy
    slice_copy"""
)

# --- how values equal others in places: what is the first operand where the others are zero, or where nothing is
# written into it; what gives elements of one operand or another, or something between
BETWEEN = SUMS_WITH_PRODUCT | {"lerp"}
WRITES = _words(
    """masked_fill masked_scatter slice_scatter select_scatter diagonal_scatter as_strided_scatter scatter scatter_add
    scatter_reduce index_put _unsafe_index_put index_add index_copy index_fill setitem"""
)
CHOICES = _words("where lerp maximum minimum fmax fmin")
COMMUTE = _words("add mul multiply __add__ __radd__ __mul__ __rmul__ maximum minimum")
# Other words for an operation on one tensor, but for a factor and where it stops.
SPELLINGS = {
    **{"amax": "max", "amin": "min", "mean": "sum", "_softmax": "softmax", "_log_softmax": "log_softmax"},
    **dict.fromkeys(_words("square __pow__ float_power"), "pow"),
    **dict.fromkeys(_words("relu relu6 clip clamp_min clamp_max hardtanh threshold"), "clamp"),
    **dict.fromkeys(_words(_NORM), "norm"),
}


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

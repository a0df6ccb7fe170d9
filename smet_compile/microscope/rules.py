"""Which rule reads which op. What is not here is taken to mix everything, and is named in the inspection."""

from __future__ import annotations

from smet_compile.microscope import convolutions, elementwise, indexing, movement, products, reductions
from smet_compile.microscope.reading import Reading, Rule

RULES: dict[str, Rule] = {
    "pointwise": elementwise.pointwise,
    "unknown": Reading.opaque,
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "matmul"), products.mm),
    **dict.fromkeys(("addmm", "baddbmm"), products.addmm),
    **dict.fromkeys(("_grouped_mm", "transformers.grouped_mm_fallback"), products.grouped_mm),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_attention_math_for_mps",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        products.attention,
    ),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), reductions.loss),
    "embedding": indexing.embedding,
    "convolution": convolutions.convolution,
    **dict.fromkeys(convolutions.OVER_SPACE, convolutions.over_space),
    **dict.fromkeys(elementwise.KEEP_ZERO, elementwise.pointwise),
    **dict.fromkeys(("where", "masked_fill", "clamp", "clamp_min", "clamp_max", "hardtanh"), elementwise.pointwise),
    **dict.fromkeys(("native_dropout", "rms_norm", "_fused_rms_norm", "_prelu_kernel"), elementwise.keep),
    **dict.fromkeys(elementwise.SHIFT, elementwise.shift),
    **dict.fromkeys(reductions.REDUCTIONS, reductions.reduction),
    **dict.fromkeys(reductions.ALONG_DIM, reductions.along_dim),
    **dict.fromkeys(movement.SHAPES, movement.shape),
    **dict.fromkeys(movement.VIEWS, movement.view),
    **dict.fromkeys(("cat", "stack"), movement.cat),
    "constant_pad_nd": movement.pad,
    "view_as_complex": movement.as_complex,
    "view_as_real": movement.as_real,
    "index": indexing.index,
    **dict.fromkeys(("index_select", "gather"), indexing.index_select),
    **dict.fromkeys(("index_add", "scatter", "scatter_add", "index_copy"), indexing.write),
    **dict.fromkeys(("index_put", "_unsafe_index_put"), indexing.index_put),
    "copy": indexing.copy,
    **dict.fromkeys((*movement.MADE, *movement.MADE_ZERO), movement.made),
}

"""Which rule reads which op. What is not here is taken to mix everything, and is named in the inspection."""

from __future__ import annotations

from smet_compile.microscope import elementwise, indexing, movement, products
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
        ),
        products.attention,
    ),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), elementwise.loss),
    "embedding": products.embedding,
    "convolution": products.convolution,
    **dict.fromkeys(elementwise.KEEP_ZERO, elementwise.pointwise),
    **dict.fromkeys(("where", "masked_fill"), elementwise.pointwise),
    **dict.fromkeys(("native_dropout", "rms_norm", "_fused_rms_norm"), elementwise.keep),
    **dict.fromkeys(elementwise.SHIFT, elementwise.shift),
    **dict.fromkeys(elementwise.REDUCTIONS, elementwise.reduction),
    **dict.fromkeys(("topk", "sort", "cumsum", "max", "min", "kthvalue", "logcumsumexp"), elementwise.along_dim),
    **dict.fromkeys(movement.SHAPES, movement.shape),
    **dict.fromkeys(movement.VIEWS, movement.view),
    **dict.fromkeys(("cat", "stack"), movement.cat),
    "constant_pad_nd": movement.pad,
    "index": indexing.index,
    **dict.fromkeys(("index_select", "gather"), indexing.index_select),
    **dict.fromkeys(("index_add", "scatter", "scatter_add", "index_copy"), indexing.write),
    **dict.fromkeys(("index_put", "_unsafe_index_put"), indexing.index_put),
    "copy": indexing.copy,
    **dict.fromkeys((*movement.MADE, *movement.MADE_ZERO), movement.made),
}

"""Mixtures of experts in transformers, by folder name, each with the weights that route tokens, written by hand."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
import transformers
from torch import nn

GATE = ("*.mlp.gate.weight",)
GATE_AND_SHARED = (*GATE, "*.mlp.shared_expert_gate.weight")
ROUTER = ("*.mlp.router.weight",)
GRANITE = ("*.block_sparse_moe.router.weight",)
CLASSIFIER = ("*.router.classifier.weight",)

ROUTERS: dict[str, tuple[str, ...]] = {
    "afmoe": ("*.mlp.router.gate.weight",),
    "aria": ROUTER,
    "axk1": GATE,
    "axk2": GATE,
    "bailing_hybrid": GATE,
    "beam": GATE,
    "cohere2_moe": GATE,
    "dbrx": ("*.ffn.router.layer.weight",),
    "deepseek_ocr2": GATE,
    "deepseek_v2": GATE,
    "deepseek_v3": GATE,
    "deepseek_v32": GATE,
    "deepseek_v4": GATE,
    "diffusion_gemma": ("*.router.proj.weight",),
    "doge": ("*.mlp.router_gate.weight",),
    "dots1": GATE,
    "dots3_note": GATE,
    "ernie4_5_moe": (*GATE, "*.gate.moe_statics.e_score_correction_bias"),
    "ernie4_5_vl_moe": (
        "*.mlp.text_moe.gate.weight",
        "*.mlp.vision_moe.gate.weight",
        "*.gate.moe_statics.e_score_correction_bias",
    ),
    "exaone_moe": GATE,
    "flex_olmo": GATE,
    "flint": GATE,
    "gemma4": ("*.router.proj.weight",),
    "glm4_moe": GATE,
    "glm4_moe_lite": GATE,
    "glm4v_moe": GATE,
    "glm5_next": GATE,
    "glm_moe_dsa": GATE,
    "gpt_oss": ROUTER,
    "granitemoe": GRANITE,
    "granitemoe_swa": GRANITE,
    "granitemoehybrid": GRANITE,
    "granitemoeshared": GRANITE,
    "hunyuan_v1_moe": ("*.mlp.gate.wg.weight",),
    "hy_v3": GATE,
    "hy_v4": GATE,
    "inkling": GATE,
    "inkling2": GATE,
    "jamba": ("*.feed_forward.router.weight",),
    "jetmoe": ("*.mlp.router.layer.weight", "*.self_attention.experts.router.layer.weight"),
    "kimi_linear": GATE,
    "kolibri1": GATE,
    "laguna": GATE,
    "lfm2_moe": ("*.feed_forward.gate.weight",),
    "llama4": ("*.feed_forward.router.weight",),
    "longcat_flash": CLASSIFIER,
    "mellum": GATE,
    "mimo_v2_flash": GATE,
    "minimax": GATE,
    "minimax_m2": GATE,
    "minimax_m3_vl": GATE,
    "mistral4": GATE,
    "mistral_large4": GATE,
    "mixtral": GATE,
    "muse_spark": GATE,
    "nemotron_h": ("*.mixer.gate.weight",),
    "nllb_moe": CLASSIFIER,
    "olmoe": GATE,
    "openai_privacy_filter": ROUTER,
    "phimoe": ROUTER,
    "qwen2_moe": GATE_AND_SHARED,
    "qwen3_5_moe": GATE_AND_SHARED,
    "qwen3_moe": GATE,
    "qwen3_next": GATE_AND_SHARED,
    "qwen3_omni_moe": GATE,
    "qwen3_vl_moe": GATE,
    "qwen4_exp": GATE_AND_SHARED,
    "solar_open": GATE,
    "step3p7": GATE,
    "switch_transformers": CLASSIFIER,
    "unlimited_ocr": GATE,
    "zaya": ("*.mlp.gate.down_proj.weight", "*.mlp.gate.router_mlp.*.weight"),
}

MANY_EXPERTS = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10_000.0}},
    "deepseek_ocr2": {"mlp_layer_types": ["dense"] + ["sparse"] * 31},
    "diffusion_gemma": MANY_EXPERTS,
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4": MANY_EXPERTS | {"enable_moe_block": True},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "qwen4_exp": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}

FEW = ("deepseek_v3", "gpt_oss", "hunyuan_v1_moe", "jetmoe", "llama4", "mixtral", "qwen3_next", "switch_transformers")


def build(name: str) -> nn.Module | None:
    """Returns the text model of the family's default configuration on the meta device, None where there is none."""
    try:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except ImportError:
        return None
    classes = [
        made
        for made in vars(module).values()
        if inspect.isclass(made)
        and issubclass(made, transformers.PreTrainedModel)
        and made.__module__ == module.__name__
        and not made.__name__.endswith("PreTrainedModel")
    ]
    ends = ("ForCausalLM", "TextModel", "ForConditionalGeneration", "Model")
    chosen = next(made for end in ends for made in classes if made.__name__.endswith(end))
    with torch.device("meta"):
        model: nn.Module = chosen(chosen.config_class(**OPTIONS.get(name, {})))
    return model

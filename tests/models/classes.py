"""Lists small random configurations of real model classes, with a batch and the weights that become compact."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class RealModel:
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]]
    compact: tuple[str, ...]
    dense: tuple[str, ...]


def tokens(*names: str) -> Callable[[], dict[str, torch.Tensor]]:
    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(5))
        return {name: ids for name in names}

    return batch


def pixels() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 2])}


def llama(**more: Any) -> hf.LlamaForCausalLM:
    config = hf.LlamaConfig(**SMALL, intermediate_size=53, num_key_value_heads=1, **more)
    return hf.LlamaForCausalLM(config)


def mixtral(**more: Any) -> hf.MixtralForCausalLM:
    config = hf.MixtralConfig(
        **SMALL,
        intermediate_size=24,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        **more,
    )
    return hf.MixtralForCausalLM(config)


def gpt2() -> hf.GPT2LMHeadModel:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16))


def t5() -> hf.T5ForConditionalGeneration:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))


def bert() -> hf.BertForMaskedLM:
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=16))


def vit() -> hf.ViTForImageClassification:
    sizes = {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = hf.ViTConfig(**sizes, intermediate_size=48, image_size=8, patch_size=4, num_labels=3)
    return hf.ViTForImageClassification(config)


CAUSAL = tokens("input_ids", "labels")
REAL_MODELS = {
    "llama": RealModel(llama, CAUSAL, ("*.q_proj.weight", "*.down_proj.weight"), ("lm_head.weight", "*embed_tokens*")),
    "gpt2": RealModel(gpt2, CAUSAL, ("*.c_attn.weight", "*.c_proj.weight"), ("*wte.weight", "*wpe.weight")),
    "bert": RealModel(bert, CAUSAL, ("*.query.weight", "*.intermediate.dense.weight"), ("*embeddings*", "*LayerNorm*")),
    "vit": RealModel(vit, pixels, ("classifier.weight",), ("*cls_token", "*position_embeddings", "*patch_embed*")),
    "t5": RealModel(t5, CAUSAL, ("*.q.weight", "*.wo.weight"), ("shared.weight", "*relative_attention_bias*")),
    "mixtral": RealModel(
        mixtral,
        CAUSAL,
        ("*.experts.gate_up_proj", "*.experts.down_proj", "*.q_proj.weight"),
        ("lm_head.weight", "*.gate.weight"),
    ),
}

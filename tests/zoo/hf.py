# SPDX-License-Identifier: MIT
"""transformers' own classes from tiny random configs; transformers is imported by make() alone.

A row is a model class, a config class and the config's sizes: widths, head counts and lengths
differ where the family lets them, so that no wrong axis fits by chance. use_cache=False, or a
language model returns a cache object, which torch.export refuses. A mixture of experts exports
with the implementations batched_mm and grouped_mm (transformers' default), not with eager, which
loops over the experts that were hit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.zoo.common import Entry, Example, entry

Inputs = dict[str, Tensor]

VOCABULARY = 13
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = IDS | {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
FOUR_HEADS = BERT | {"num_attention_heads": 4}
WIDE_HEADS = BERT | {"hidden_size": 16}  # 8 channels a head, of which a part is rotated
LLAMA = FOUR_HEADS | {"num_key_value_heads": 2, "head_dim": 4}
GPT2 = IDS | {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
DISTILBERT = IDS | {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12}
DISTILBERT |= {"max_position_embeddings": 16}
OPT = BERT | {"word_embed_proj_dim": 6, "ffn_dim": 12}
T5 = IDS | {"d_model": 8, "d_kv": 3, "d_ff": 12, "num_layers": 2, "num_heads": 2}
BART = IDS | {
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 10,
    "decoder_start_token_id": 1,
}
WHISPER = BART | {"num_mel_bins": 5, "max_source_positions": 6, "max_target_positions": 8}
VIT = {
    "image_size": 12,
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_labels": 3,
}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 6,
    "depths": [2, 1],
    "num_heads": [2, 3],
    "window_size": 4,
    "num_labels": 3,
}
STAGES = {"hidden_sizes": [4, 6], "depths": [1, 2], "num_labels": 3}
BOTTLENECK = {"hidden_sizes": [8, 12], "depths": [1, 2], "embedding_size": 4, "num_labels": 3}
REGNET = BOTTLENECK | {"hidden_sizes": [4, 8], "groups_width": 2}
MOBILE = {"depth_multiplier": 0.1, "depth_divisible_by": 2, "min_depth": 2, "num_labels": 3}
EFFICIENT = {
    "in_channels": [4, 3],
    "out_channels": [3, 5],
    "kernel_sizes": [3, 5],
    "strides": [1, 2],
    "expand_ratios": [1, 4],
    "num_block_repeats": [1, 2],
    "depthwise_padding": [],
    "width_coefficient": 0.01,
    "depth_coefficient": 1.0,
    "depth_divisor": 2,
    "hidden_dim": 12,
    "num_labels": 3,
}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [4, 6],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 5,
    "num_labels": 3,
}


def text() -> Inputs:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 6))}


def padded() -> Inputs:
    """A batch with its attention mask: the second text is two tokens shorter."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return text() | {"attention_mask": mask}


def pair() -> Inputs:
    return text() | {"decoder_input_ids": torch.randint(3, VOCABULARY, (2, 5))}


def picture(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def sound() -> Inputs:
    """Twelve frames of five mel bins; the second convolution halves the frames."""
    ids = torch.randint(3, VOCABULARY, (2, 5))
    return {"input_features": torch.randn(2, 5, 12), "decoder_input_ids": ids}


def hf(
    name: str,
    model: str,
    inputs: Callable[[], Inputs],
    sizes: dict[str, Any],
    config: str = "",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Entry:
    """transformers.<model>; its config class is named after it unless config says another.

    options: more sizes, attn_implementation ("sdpa" by default where the class has it, else
    "eager"), experts_implementation, tie_word_embeddings.
    """
    config = config or model.split("For", maxsplit=1)[0].removesuffix("Model") + "Config"

    def build() -> Example:
        import transformers

        cfg = getattr(transformers, config)(**sizes, **options)
        cfg.use_cache = False
        if "tie_word_embeddings" in options:  # T5's config sets it back to True
            cfg.tie_word_embeddings = options["tie_word_embeddings"]
        return getattr(transformers, model)(cfg).to(dtype), (), inputs()

    return entry(name, build)


def both(name: str, *row: Any, **options: Any) -> list[Entry]:
    """The entry with attention written out, and with scaled_dot_product_attention."""
    return [
        hf(f"{name}_{attn}", *row, attn_implementation=attn, **options)
        for attn in ("eager", "sdpa")
    ]


ENCODERS = [
    *both("hf_bert", "BertForSequenceClassification", padded, BERT),
    hf("hf_bert_mlm", "BertForMaskedLM", text, BERT),  # the head's weight is the embedding's
    hf("hf_roberta", "RobertaForTokenClassification", text, BERT),
    hf("hf_electra", "ElectraForMaskedLM", text, BERT, embedding_size=6),
    hf("hf_albert", "AlbertModel", text, BERT, embedding_size=6),  # one block, called twice
    hf("hf_distilbert", "DistilBertForQuestionAnswering", padded, DISTILBERT),
    hf("hf_deberta_v2", "DebertaV2Model", text, BERT),
    hf("hf_modernbert", "ModernBertForMaskedLM", text, BERT, cls_token_id=1, sep_token_id=2),
    hf("hf_clip_text", "CLIPTextModel", text, FOUR_HEADS),
]

EAGER = {"attn_implementation": "eager"}
DECODERS = [
    *both("hf_gpt2", "GPT2LMHeadModel", text, GPT2, config="GPT2Config"),
    *both("hf_llama", "LlamaForCausalLM", text, LLAMA),
    hf("hf_llama_padded", "LlamaForCausalLM", padded, LLAMA),
    hf("hf_mistral", "MistralForCausalLM", text, LLAMA, sliding_window=4),
    hf("hf_qwen2", "Qwen2ForCausalLM", text, LLAMA, tie_word_embeddings=True),
    hf("hf_qwen3", "Qwen3ForCausalLM", text, LLAMA),  # norms on the heads of q and k
    hf("hf_gemma", "GemmaForCausalLM", text, LLAMA),  # norms scale by 1 + weight
    hf("hf_gemma2", "Gemma2ForCausalLM", text, LLAMA, **EAGER),  # norms on both sides; soft caps
    hf("hf_gemma3", "Gemma3ForCausalLM", text, LLAMA, config="Gemma3TextConfig"),
    hf("hf_phi", "PhiForCausalLM", text, WIDE_HEADS),  # attention and MLP side by side
    hf("hf_phi3", "Phi3ForCausalLM", text, LLAMA),  # packed qkv, packed gate and up
    hf("hf_gpt_neox", "GPTNeoXForCausalLM", text, WIDE_HEADS),  # qkv packed inside each head
    hf("hf_falcon", "FalconForCausalLM", text, FOUR_HEADS),  # one key/value head, picked by index
    hf("hf_bloom", "BloomForCausalLM", text, IDS, hidden_size=8, n_layer=2, n_head=2),
    hf("hf_opt", "OPTForCausalLM", text, OPT),
]

MIXTRAL = LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 2}
QWEN3_MOE = LLAMA | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
BATCHED, GROUPED = ({"experts_implementation": how} for how in ("batched_mm", "grouped_mm"))
EXPERTS = [
    hf("hf_mixtral_batched_mm", "MixtralForCausalLM", text, MIXTRAL, **BATCHED),
    hf("hf_mixtral_grouped_mm", "MixtralForCausalLM", text, MIXTRAL, **GROUPED),
    # Only bfloat16 reaches torch's own grouped product, which wants rows of 16 bytes.
    hf(
        *("hf_mixtral_bfloat16", "MixtralForCausalLM", text),
        MIXTRAL | {"intermediate_size": 16},
        dtype=torch.bfloat16,
        **GROUPED,
    ),
    hf("hf_qwen3_moe", "Qwen3MoeForCausalLM", text, QWEN3_MOE, **BATCHED),
]

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SEQ2SEQ = [
    *both("hf_t5", "T5ForConditionalGeneration", pair, T5),
    hf("hf_t5_gated", "T5ForConditionalGeneration", pair, T5, **GATED),
    hf("hf_bart", "BartForConditionalGeneration", pair, BART, max_position_embeddings=16),
    hf("hf_whisper", "WhisperForConditionalGeneration", sound, WHISPER),
]

PICTURES = [
    hf("hf_vit", "ViTForImageClassification", picture(12), VIT),
    hf("hf_deit", "DeiTForImageClassification", picture(12), VIT),
    hf("hf_dinov2", "Dinov2ForImageClassification", picture(12), VIT),
    hf("hf_siglip", "SiglipVisionModel", picture(12), VIT),  # pooled by nn.MultiheadAttention
    hf("hf_swin", "SwinForImageClassification", picture(16), SWIN),
    hf("hf_segformer", "SegformerForSemanticSegmentation", picture(32), SEGFORMER),
    hf("hf_convnext", "ConvNextForImageClassification", picture(16), STAGES, num_stages=2),
    hf("hf_convnextv2", "ConvNextV2ForImageClassification", picture(16), STAGES, num_stages=2),
    hf(
        *("hf_resnet_basic", "ResNetForImageClassification", picture(32), STAGES),
        embedding_size=4,
        layer_type="basic",
    ),
    hf("hf_resnet_bottleneck", "ResNetForImageClassification", picture(32), BOTTLENECK),
    hf("hf_regnet", "RegNetForImageClassification", picture(32), REGNET),
    hf("hf_mobilenet_v2", "MobileNetV2ForImageClassification", picture(32), MOBILE),
    hf("hf_efficientnet", "EfficientNetForImageClassification", picture(32), EFFICIENT),
]

ENTRIES: list[Entry] = [*ENCODERS, *DECODERS, *EXPERTS, *SEQ2SEQ, *PICTURES]

"""Tiny randomly initialised models, one for every mixture-of-experts family in transformers.

Each entry shrinks one architecture whose experts module uses `use_experts_implementation` until it builds and runs on a
CPU in well under a second. The tests build a family with `build_model`, save it with `save_pretrained` and load the
checkpoint back, so that every checkpoint layout transformers writes (one tensor per expert, stacked, transposed,
interleaved, biased, ...) passes through the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

VOCAB_SIZE = 128
BATCH_SIZE = 2
SEQUENCE_LENGTH = 7

# Applied to every config class, nested ones included, that declares the attribute.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "shared_intermediate_size": 40,
    "shared_expert_intermediate_size": 40,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    # one dense layer, then experts
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_only_layers": [0],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    # latent, sparse and linear attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # vision and audio towers
    "depth": 1,
    "num_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "position_embedding_size": 16,
    "projector_hidden_size": 32,
    "projection_intermediate_size": 40,
    "output_channels": 32,
    "mlp_dim": 40,
}


@dataclass(frozen=True)
class Family:
    """One architecture: the transformers class to build and how its config departs from `COMMON`."""

    name: str
    architecture: str
    overrides: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        return getattr(transformers, self.architecture)


def _family(name: str, architecture: str, note: str = "", **overrides: Any) -> Family:
    return Family(name, architecture, overrides, note)


HYBRID = ["linear_attention", "full_attention", "linear_attention"]
INDEXED_HYBRID = ["linear_attention", "indexed_attention", "linear_attention"]
GLOBAL_LAST = ["sliding_attention", "sliding_attention", "full_attention"]
SWA_HEADS = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _family("afmoe", "AfmoeForCausalLM", "sigmoid router, shared experts"),
        _family("aria", "AriaForConditionalGeneration", "stacked, transposed"),
        _family("axk1", "AXK1ForCausalLM"),
        _family("axk2", "AXK2ForCausalLM", "sparse attention"),
        _family("bailing_hybrid", "BailingHybridForCausalLM", "linear attention", layer_types=HYBRID),
        _family("beam", "BeamForCausalLM"),
        _family("cohere2_moe", "Cohere2MoeForCausalLM", "tied embeddings", logit_scale=1.0),
        _family(
            "deepseek_ocr2",
            "DeepseekOcr2ForConditionalGeneration",
            vision_config={"sam_config": {"downsample_channels": [32, 32]}},
        ),
        _family("deepseek_v2", "DeepseekV2ForCausalLM", topk_method="group_limited_greedy"),
        _family("deepseek_v3", "DeepseekV3ForCausalLM", "sigmoid router with score correction"),
        _family("deepseek_v32", "DeepseekV32ForCausalLM", "sparse attention"),
        _family(
            "deepseek_v4",
            "DeepseekV4ForCausalLM",
            "hash router, clamped gate",
            mlp_layer_types=["hash_moe", "moe", "moe"],
            layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            num_key_value_heads=1,
            head_dim=16,
            partial_rotary_factor=0.5,
            o_groups=2,
            o_lora_rank=8,
        ),
        _family(
            "diffusion_gemma",
            "DiffusionGemmaForBlockDiffusion",
            "stacked, encoder and decoder share their experts",
            canvas_length=SEQUENCE_LENGTH,
            text_config={"layer_types": GLOBAL_LAST, "global_head_dim": 16},
        ),
        _family("dots1", "Dots1ForCausalLM"),
        _family(
            "dots3_note",
            "Dots3NoteForConditionalGeneration",
            "experts in the vision tower as well",
            text_config={"layer_types": ["indexed_attention"] * 3, "shared_experts_intermediate_size": 40},
            vision_config={"adapter_in_dim": 32, "adapter_out_dim": 32},
            audio_config={
                "adapter_input_size": 32,
                "adapter_out_dim": 32,
                "feature_size": 8,
                "downsample_hidden_size": 8,
            },
        ),
        _family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "tied embeddings"),
        _family(
            "ernie4_5_vl_moe",
            "Ernie4_5_VLMoeForConditionalGeneration",
            "text and vision experts of different widths in each layer",
            text_config={
                "moe_intermediate_size": [24, 16],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            },
        ),
        _family("exaone_moe", "ExaoneMoeForCausalLM"),
        _family("flex_olmo", "FlexOlmoForCausalLM"),
        _family("flint", "FlintForCausalLM"),
        _family(
            "gemma4",
            "Gemma4ForConditionalGeneration",
            "stacked, dense MLP beside the experts",
            text_config={
                "layer_types": GLOBAL_LAST,
                "global_head_dim": 16,
                "enable_moe_block": True,
                "vocab_size_per_layer_input": VOCAB_SIZE,
                "hidden_size_per_layer_input": 8,
            },
            audio_config={"subsampling_conv_channels": [8, 8], "output_proj_dims": 32},
        ),
        _family("glm4_moe", "Glm4MoeForCausalLM"),
        _family("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
        _family(
            "glm4v_moe",
            "Glm4vMoeForConditionalGeneration",
            text_config={
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [2, 1, 1],
                },
            },
        ),
        _family(
            "glm5_next",
            "Glm5NextForConditionalGeneration",
            "linear and sparse attention, clamped gate",
            text_config={"qk_rope_head_dim": 0, "index_kpool": 2, "layer_types": INDEXED_HYBRID},
        ),
        _family("glm_moe_dsa", "GlmMoeDsaForCausalLM", "sparse attention"),
        _family("gpt_oss", "GptOssForCausalLM", "stacked, transposed, biased, interleaved gate"),
        _family("granitemoe", "GraniteMoeForCausalLM", "stacked"),
        _family("granitemoe_swa", "GraniteMoeSWAForCausalLM", "stacked"),
        _family(
            "granitemoehybrid",
            "GraniteMoeHybridForCausalLM",
            "stacked, mamba",
            layer_types=HYBRID,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_chunk_size=4,
        ),
        _family("granitemoeshared", "GraniteMoeSharedForCausalLM", "stacked, shared experts"),
        _family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
        _family("hy_v3", "HYV3ForCausalLM"),
        _family("hy_v4", "HYV4ForCausalLM", "stacked, clamped gate"),
        _family(
            "inkling",
            "InklingForConditionalGeneration",
            "stacked, interleaved on disk",
            text_config={**SWA_HEADS, "d_rel": 4, "rel_extent": 16, "logits_mup_width_multiplier": 1.0},
            vision_config={"num_hidden_layers": 4, "hidden_size": 8},
            audio_config={"n_mel_bins": 4, "mel_vocab_size": 16},
        ),
        _family(
            "inkling2",
            "Inkling2ForConditionalGeneration",
            "stacked, interleaved on disk",
            text_config={**SWA_HEADS, "d_rel": 4, "rel_extent": 16, "unpadded_vocab_size": 120},
            vision_config={"projection_hidden_dim": 32},
        ),
        _family(
            "jamba",
            "JambaForCausalLM",
            "mamba, dense layer between the sparse ones",
            expert_layer_offset=0,
            attn_layer_period=3,
            attn_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        _family("kimi_linear", "KimiLinearForCausalLM", "linear attention", layer_types=HYBRID),
        _family("kolibri1", "Kolibri1ForCausalLM"),
        _family("laguna", "LagunaForCausalLM"),
        _family("lfm2_moe", "Lfm2MoeForCausalLM", "convolutions", layer_types=["conv", "full_attention", "conv"]),
        _family("mellum", "MellumForCausalLM"),
        _family("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
        _family("minimax", "MiniMaxForCausalLM", "lightning attention", block_size=4),
        _family("minimax_m2", "MiniMaxM2ForCausalLM", "sigmoid router with score correction"),
        _family(
            "minimax_m3_vl",
            "MiniMaxM3SparseForConditionalGeneration",
            "clamped gate",
            text_config={"dense_intermediate_size": 40, "rotary_dim": 4},
        ),
        _family("mistral4", "Mistral4ForCausalLM", "stacked"),
        _family("mistral_large4", "MistralLarge4ForConditionalGeneration"),
        _family("mixtral", "MixtralForCausalLM"),
        _family(
            "muse_spark",
            "MuseSparkForConditionalGeneration",
            "stacked, norm after each expert, experts narrower than the model",
            text_config={"moe_hidden_size": 16},
            vision_config={"pos_emb_height": 4, "pos_emb_width": 4},
            audio_config={"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [8], "depths": [1]},
        ),
        _family(
            "nemotron_h",
            "NemotronHForCausalLM",
            "experts without a gate, mamba",
            layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=2,
            chunk_size=4,
            moe_shared_expert_intermediate_size=40,
        ),
        _family("olmoe", "OlmoeForCausalLM"),
        _family(
            "openai_privacy_filter",
            "OpenAIPrivacyFilterForTokenClassification",
            "stacked, transposed, biased, concatenated gate",
            num_labels=VOCAB_SIZE,
        ),
        _family("phimoe", "PhimoeForCausalLM"),
        _family("qwen2_moe", "Qwen2MoeForCausalLM", "gated shared expert"),
        _family(
            "qwen3_5_moe",
            "Qwen3_5MoeForConditionalGeneration",
            "linear attention",
            text_config={"layer_types": HYBRID},
        ),
        _family("qwen3_moe", "Qwen3MoeForCausalLM"),
        _family("qwen3_next", "Qwen3NextForCausalLM", "linear attention", layer_types=HYBRID),
        _family(
            "qwen3_omni_moe",
            "Qwen3OmniMoeThinkerForConditionalGeneration",
            audio_config={
                "encoder_layers": 1,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 16,
                "d_model": 16,
                "num_mel_bins": 8,
                "output_dim": 32,
                "downsample_hidden_size": 8,
            },
        ),
        _family("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "stacked, transposed on the hub"),
        _family(
            "qwen4_exp",
            "Qwen4ExpForConditionalGeneration",
            "linear and sparse attention",
            text_config={
                "layer_types": INDEXED_HYBRID,
                "hc_lowrank": 8,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 4,
                "indexer_compress_ratio": 2,
            },
        ),
        _family("solar_open", "SolarOpenForCausalLM"),
        _family(
            "unlimited_ocr",
            "UnlimitedOcrForConditionalGeneration",
            vision_config={"sam_config": {"downsample_channels": [32, 32]}},
        ),
        _family(
            "zaya",
            "ZayaForCausalLM",
            "stacked, one expert per token or none",
            num_experts_per_tok=1,
            router_hidden_size=16,
        ),
    )
}

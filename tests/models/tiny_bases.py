"""A tiny random base model of any architecture that transformers classifies sequences with."""

from pathlib import Path
from typing import Any

from tests.conftest import VOCABULARY, save_tokenizer

POSITIONS = 80


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


#: By the names that configs have for them.
SIZES: dict[str, Any] = {
    **_all("hidden_size d_model n_embd dim emb_dim pooler_hidden_size d_latents entity_emb_size embed_dim", 32),
    **_all("pronunciation_embed_dim shape_embed_dim out_hidden_size image_size", 32),
    **_all("intermediate_size d_inner d_ff dff n_inner hidden_dim ffn_dim encoder_ffn_dim decoder_ffn_dim", 48),
    **_all("ffn_hidden_size ffn_intermediate_size feed_forward_size", 48),
    **_all("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers", 2),
    **_all("num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads", 2),
    **_all("num_key_value_heads depth num_self_attends_per_block num_experts_per_tok", 2),
    **_all("head_dim d_head d_kv embedding_size patch_size", 16),
    **_all("moe_intermediate_size shared_expert_intermediate_size", 24),
    **_all("num_experts num_local_experts n_routed_experts", 4),
    **_all("max_position_embeddings n_positions n_ctx max_seq_len", POSITIONS),
    **_all("vocab_size entity_vocab_size pronunciation_vocab_size shape_vocab_size", len(VOCABULARY)),
    "num_latents": 8,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}
_LATENT = {
    **_all("q_lora_rank kv_lora_rank v_head_dim", 16),
    **_all("qk_rope_head_dim qk_nope_head_dim head_dim", 8),
    **_all("n_group topk_group", 1),
}
_HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
#: What an architecture needs besides.
CHANGES: dict[str, dict[str, Any]] = {
    **_all("axk1 axk2 deepseek_v3", _LATENT),
    **_all("qwen3_5_text qwen3_next", {"num_hidden_layers": 4}),
    **_all("zamba zamba2", _HYBRID),
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "funnel": {"block_sizes": [1, 1], "num_hidden_layers": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "jamba": _all("attn_layer_period expert_layer_period", 2) | _all("attn_layer_offset expert_layer_offset", 1),
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "visual_embed": False},
    "lilt": {"hidden_size": 48},
    "mistral4": {**_LATENT, "head_dim": 16},
    "reformer": {"axial_pos_shape": [8, 10], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
    "squeezebert": {"embedding_size": 32},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
}


def tiny_config_of(model_type: str, **changes: Any) -> Any:
    """The architecture's default config with every size made small, those of configs inside it too."""
    from transformers import AutoConfig

    return _shrunk(AutoConfig.for_model(model_type), changes)


def _shrunk(config: Any, changes: dict[str, Any]) -> Any:
    from transformers import PreTrainedConfig

    known = {**config.to_dict(), **config.attribute_map}
    settings = {name: size for name, size in SIZES.items() if name in known} | {"pad_token_id": 0}
    for name in known:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            settings[name] = _shrunk(part, {}).to_dict()
    settings |= CHANGES.get(config.model_type, {}) | changes
    return type(config)(**{name: value for name, value in settings.items() if value is not None})


def save_tiny_base(folder: Path, model_type: str, **changes: Any) -> Path:
    """Saves an encoder with random weights, and a tokenizer that sets no limit of its own."""
    import torch
    from transformers import AutoModel, FunnelBaseModel

    make = FunnelBaseModel if model_type == "funnel" else AutoModel.from_config  # which has two kinds of it
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make(tiny_config_of(model_type, **changes)).save_pretrained(folder)
    save_tokenizer(folder, model_max_length=10_000)
    return folder

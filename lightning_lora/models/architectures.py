"""What differs between architectures. A new one is one entry in ``ARCHITECTURES``.

Module names are those of the ``...ForSequenceClassification`` classes of transformers 5.23.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Architecture:
    """Names of modules in one architecture.

    Args:
        head: Modules of the classification head: always trained and saved.
        pooler: Modules between encoder and head that some checkpoints hold and others lack: trained and
            saved when newly initialised, else left as pretrained.
        query_value: Linear layers that project queries and values, in this order, as endings of module names.
        attention: All linear layers of the attention.
        key: The linear layer that projects keys, as the ending of its name.
        feed_forward_out: The second linear layer of the feed-forward block, as its path inside a numbered layer.
        attention_end: The module of a numbered layer behind which states are no longer mixed between tokens, and
            whose inputs are states of all tokens; None where there is none, or where the head reads more than the
            first token.
        states: Where there is no ``attention_end``, the module that gives the last states of all tokens.
        packs: Whether its attention is one that transformers lets others replace, as packed batches need; causal
            attention is not packed.
        head_layers: The linear layers of the head in their order, where it can be given the mean of a text's states;
            there it is these with the activation between them, and nothing else.
        head_activation: The name that transformers has for that activation, or of the setting in config.json that
            holds it.
    """

    head: tuple[str, ...]
    pooler: tuple[str, ...] = ()
    query_value: tuple[str, ...] = ("query", "value")
    attention: tuple[str, ...] = ("query", "key", "value", "attention.output.dense")
    key: str = "key"
    feed_forward_out: str = "output.dense"
    attention_end: str | None = None
    states: str | None = None
    packs: bool = True
    head_layers: tuple[str, ...] = ()
    head_activation: str = "tanh"


_BERT = Architecture(
    head=("classifier",), pooler=("bert.pooler",), attention_end="attention.output", head_layers=("classifier",)
)
_ROBERTA = Architecture(
    head=("classifier",),
    attention_end="attention.output",
    head_layers=("classifier.dense", "classifier.out_proj"),
)
_LLAMA = Architecture(
    head=("score",),
    query_value=("q_proj", "v_proj"),
    attention=("q_proj", "k_proj", "v_proj", "o_proj"),
    key="k_proj",
    feed_forward_out="mlp.down_proj",
    packs=False,
)

#: By ``model_type`` of the base model's config. MiniLM checkpoints are of type bert, roberta or xlm-roberta.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": replace(_ROBERTA, head_activation="gelu"),
    "distilbert": Architecture(
        head=("pre_classifier", "classifier"),
        query_value=("q_lin", "v_lin"),
        attention=("q_lin", "k_lin", "v_lin", "out_lin"),
        key="k_lin",
        feed_forward_out="ffn.lin2",
        attention_end="sa_layer_norm",
        head_layers=("pre_classifier", "classifier"),
        head_activation="relu",
    ),
    "deberta-v2": Architecture(
        head=("pooler", "classifier"),
        query_value=("query_proj", "value_proj"),
        attention=("query_proj", "key_proj", "value_proj", "attention.output.dense"),
        key="key_proj",
        attention_end="attention.output",
        packs=False,
        head_layers=("pooler.dense", "classifier"),
        head_activation="pooler_hidden_act",
    ),
    "modernbert": Architecture(
        head=("classifier",),
        pooler=("head",),
        query_value=("Wqkv",),
        attention=("Wqkv", "attn.Wo"),
        key="Wqkv",
        feed_forward_out="mlp.Wo",
        states="model.final_norm",
    ),
    "albert": Architecture(
        head=("classifier",),
        pooler=("albert.pooler",),
        attention=("query", "key", "value", "attention.dense"),
        feed_forward_out="ffn_output",
        states="albert.encoder",
        head_layers=("classifier",),
    ),
    # Language models, whose head reads the last token. Query, key and value are one layer in GPT-2 and Phi-3.
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA),
    "gpt2": replace(
        _LLAMA,
        query_value=("c_attn",),
        attention=("c_attn", "attn.c_proj"),
        key="c_attn",
        feed_forward_out="mlp.c_proj",
    ),
    "phi": replace(_LLAMA, attention=("q_proj", "k_proj", "v_proj", "self_attn.dense"), feed_forward_out="mlp.fc2"),
    "phi3": replace(_LLAMA, query_value=("qkv_proj",), attention=("qkv_proj", "o_proj"), key="qkv_proj"),
}

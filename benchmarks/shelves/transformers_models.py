"""The Flax models of Hugging Face's transformers 4.x, at small sizes, random weights.

LongT5 is not here: it calls jnp.clip with an argument that this JAX has dropped.
Each is called as its users do, through the wrapper object that makes the default masks
and positions and then applies the Linen module.
"""

from __future__ import annotations

import copy
from typing import Any

import jax
import transformers as hf

from .case import Case, Shelf, draw, normal, tokens

MODELS = Shelf()

_TEXT = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ = {
    "vocab_size": 32,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": 32,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
_CLIP_TEXT = {**_TEXT, "projection_dim": 24}
_CLIP_VISION = {**_VISION, "projection_dim": 24}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_GPT = {"vocab_size": 32, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
_STAGES = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24],
    "depths": [1, 2, 1],
    "num_labels": 5,
}
_SPEECH = {
    **_TEXT,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
}
_WHISPER = {
    **_SEQ2SEQ,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 16,
}

# What goes in: text, text twice (encoder and decoder), image, image and text, ...
TEXT, PAIR, IMAGE, BOTH, WAVE, MEL = "text pair image both wave mel".split()
# name: (class, configuration, options, kind of input)
ROWS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "BERT, classifier": ("BertForSequenceClassification", "Bert", _TEXT, TEXT),
    "BERT, masked LM": ("BertForMaskedLM", "Bert", _TEXT, TEXT),
    "RoBERTa, classifier": ("RobertaForSequenceClassification", "Roberta", _TEXT, TEXT),
    "RoBERTa-PreLayerNorm": (
        "RobertaPreLayerNormForMaskedLM",
        "RobertaPreLayerNorm",
        _TEXT,
        TEXT,
    ),
    "XLM-RoBERTa, tokens": (
        "XLMRobertaForTokenClassification",
        "XLMRoberta",
        _TEXT,
        TEXT,
    ),
    "ELECTRA, classifier": (
        "ElectraForSequenceClassification",
        "Electra",
        {**_TEXT, "embedding_size": 24},
        TEXT,
    ),
    "ALBERT, masked LM": (
        "AlbertForMaskedLM",
        "Albert",
        {**_TEXT, "embedding_size": 16},
        TEXT,
    ),
    "DistilBERT, answers": (
        "DistilBertForQuestionAnswering",
        "DistilBert",
        {"vocab_size": 32, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        TEXT,
    ),
    "BigBird, full attention": (
        "BigBirdForSequenceClassification",
        "BigBird",
        {**_TEXT, "attention_type": "original_full"},
        TEXT,
    ),
    "RoFormer, classifier": (
        "RoFormerForSequenceClassification",
        "RoFormer",
        {**_TEXT, "embedding_size": 24},
        TEXT,
    ),
    "GPT-2": ("GPT2LMHeadModel", "GPT2", _GPT, TEXT),
    "GPT-J": ("GPTJForCausalLM", "GPTJ", {**_GPT, "rotary_dim": 4}, TEXT),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        "GPTNeo",
        {
            "vocab_size": 32,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 16,
        },
        TEXT,
    ),
    "Llama": ("LlamaForCausalLM", "Llama", _LLAMA, TEXT),
    "Mistral": ("MistralForCausalLM", "Mistral", _LLAMA, TEXT),
    "Gemma": ("GemmaForCausalLM", "Gemma", _LLAMA, TEXT),
    "BLOOM": (
        "BloomForCausalLM",
        "Bloom",
        {"vocab_size": 32, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        TEXT,
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPT",
        {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 24},
        TEXT,
    ),
    "XGLM": (
        "XGLMForCausalLM",
        "XGLM",
        {
            "vocab_size": 32,
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 16,
        },
        TEXT,
    ),
    "BART": ("BartForConditionalGeneration", "Bart", _SEQ2SEQ, PAIR),
    "mBART": ("MBartForConditionalGeneration", "MBart", _SEQ2SEQ, PAIR),
    "Blenderbot": (
        "BlenderbotForConditionalGeneration",
        "Blenderbot",
        _SEQ2SEQ,
        PAIR,
    ),
    "Blenderbot small": (
        "BlenderbotSmallForConditionalGeneration",
        "BlenderbotSmall",
        _SEQ2SEQ,
        PAIR,
    ),
    "Marian": ("MarianMTModel", "Marian", _SEQ2SEQ, PAIR),
    "Pegasus": ("PegasusForConditionalGeneration", "Pegasus", _SEQ2SEQ, PAIR),
    "T5": ("T5ForConditionalGeneration", "T5", _T5, PAIR),
    "mT5, gated": ("MT5ForConditionalGeneration", "MT5", _T5, PAIR),
    "ViT, classifier": ("ViTForImageClassification", "ViT", _VISION, IMAGE),
    "BEiT, classifier": ("BeitForImageClassification", "Beit", _VISION, IMAGE),
    "DINOv2, classifier": ("Dinov2ForImageClassification", "Dinov2", _VISION, IMAGE),
    "ResNet": ("ResNetForImageClassification", "ResNet", _STAGES, IMAGE),
    "RegNet": (
        "RegNetForImageClassification",
        "RegNet",
        {**_STAGES, "groups_width": 4},
        IMAGE,
    ),
    "CLIP": (
        "CLIPModel",
        "CLIP",
        {
            "text_config": _CLIP_TEXT,
            "vision_config": _CLIP_VISION,
            "projection_dim": 24,
        },
        BOTH,
    ),
    "Wav2Vec2, CTC": ("Wav2Vec2ForCTC", "Wav2Vec2", _SPEECH, WAVE),
    "Whisper": ("WhisperForConditionalGeneration", "Whisper", _WHISPER, MEL),
}


def inputs_of(kind: str, config: Any) -> tuple[Any, ...]:
    """Small inputs, by the names that the wrapper's call takes first."""
    text = tokens(2, 8)
    return {
        TEXT: (text,),
        PAIR: (text, text[:, ::-1]),
        IMAGE: (normal(2, 3, 16, 16),),
        BOTH: (text, normal(2, 3, 16, 16)),
        WAVE: (normal(2, 200),),
        MEL: (normal(2, 8, 40), text),
    }[kind]


def make(name: str) -> Case:
    kind, config, options, given = ROWS[name]
    settings = getattr(hf, f"{config}Config")(**options)
    wrapper = getattr(hf, f"Flax{kind}")(settings, _do_init=False)
    if given == WAVE:  # the mask that defaults to ones must not depend on values
        wrapper.config.apply_spec_augment = False

    def apply(module: Any, variables: Any, *inputs: Any) -> Any:
        held = copy.copy(wrapper)
        held._module = module
        names = {
            PAIR: ("input_ids", "decoder_input_ids"),
            MEL: ("input_features", "decoder_input_ids"),
        }.get(given)
        params = variables if "batch_stats" in variables else variables["params"]
        flag = {"deterministic": True} if "OPT" in kind else {"train": False}
        options = {"params": params, **flag}
        if names:
            return held(**dict(zip(names, inputs, strict=True)), **options)
        return held(*inputs, **options)

    shapes = wrapper.params_shape_tree
    shapes = shapes if "batch_stats" in shapes else {"params": shapes}
    variables = draw(jax.tree.map(lambda leaf: leaf, shapes))
    return Case(
        wrapper.module, variables, inputs_of(given, settings), apply, _result(given)
    )


def _result(given: str) -> Any:
    """What of the outputs stays as it is: the logits, or what is compared (CLIP)."""
    if given == BOTH:
        return lambda out: (out.logits_per_image, out.logits_per_text)
    return lambda out: [
        getattr(out, key)
        for key in ("logits", "start_logits", "end_logits")
        if getattr(out, key, None) is not None
    ]


for _name in ROWS:
    MODELS(f"{_name} (transformers)")(lambda _name=_name: make(_name))

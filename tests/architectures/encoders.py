"""Text encoders and encoder-decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.architectures.decoders import SHAPE
from tests.architectures.entry import HEAD, POSITIONS, TABLE, TIED, VOCAB, Architecture, hugging_face, tokens

BERT_LIKE: dict[str, str] = {
    "*.word_embeddings.*": TABLE,
    "*.position_embeddings.*": POSITIONS,
    "*.token_type_embeddings.*": TABLE,
}
CLASSES: dict[str, Any] = SHAPE | {"num_labels": 3}


def answer() -> Tensor:
    return torch.tensor([[1, 9, 17, 25, 33], [1, 8, 15, 22, 29], [1, 50, 40, 30, 20]])


ENCODERS = [
    Architecture(
        "BERT",
        "encoder",
        hugging_face("BertForSequenceClassification", "BertConfig", **CLASSES),
        tokens(),
        left_out=BERT_LIKE | {"classifier.*": HEAD},
        trainable=("classifier",),
    ),
    Architecture(
        "RoBERTa",
        "encoder",
        hugging_face("RobertaForMaskedLM", "RobertaConfig", **SHAPE | {"max_position_embeddings": 40}),
        tokens(),
        left_out=BERT_LIKE | {"lm_head.*": HEAD},
    ),
    Architecture(
        "ModernBERT",
        "encoder",
        hugging_face(
            "ModernBertForSequenceClassification", "ModernBertConfig", **CLASSES, cls_token_id=1, sep_token_id=2
        ),
        tokens(),
        left_out={"*.tok_embeddings.*": TABLE, "head.*": HEAD, "classifier.*": HEAD},
        trainable=("head", "classifier"),
    ),
    Architecture(
        "DeBERTa-v2 (disentangled attention)",
        "encoder",
        hugging_face(
            "DebertaV2ForSequenceClassification", "DebertaV2Config", **CLASSES, relative_attention=True,
            pos_att_type=["p2c", "c2p"], share_att_key=False, position_buckets=8, norm_rel_ebd="layer_norm",
        ),
        tokens(),
        left_out={
            "*.word_embeddings.*": TABLE,
            "*.position_embeddings.*": POSITIONS,
            "*.rel_embeddings.*": POSITIONS,
            "pooler.*": HEAD,
            "classifier.*": HEAD,
        },
        trainable=("pooler", "classifier"),
    ),
    Architecture(
        "T5",
        "encoder-decoder",
        hugging_face(
            "T5ForConditionalGeneration", "T5Config", vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2,
            num_heads=4, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
        ),
        tokens(decoder_input_ids=answer),
        left_out={"shared.*": TIED, "*.relative_attention_bias.*": POSITIONS},
    ),
    Architecture(
        "BART",
        "encoder-decoder",
        hugging_face(
            "BartForConditionalGeneration", "BartConfig", vocab_size=VOCAB, d_model=32, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=2,
        ),
        tokens(decoder_input_ids=answer),
        left_out={"*.shared.*": TIED, "*.embed_positions.*": POSITIONS},
    ),
]  # fmt: skip

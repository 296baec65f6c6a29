"""Models of images, of sound, and of both with text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.architectures.decoders import GROUPED, LLAMA_LIKE, SHAPE
from tests.architectures.entry import (
    HEAD,
    NO_EQUAL,
    PATCHES,
    POSITIONS,
    TABLE,
    TIED,
    UNCALLED,
    VOCAB,
    Architecture,
    hugging_face,
    noise,
    tokens,
)

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
IMAGES = noise(3, 3, 16, 16, name="pixel_values")
CLASSES: dict[str, Any] = {"num_labels": 3}
IMAGE_TOKEN = 3


def images() -> Tensor:
    return IMAGES()["pixel_values"]


def both_embeddings(model: Any, **inputs: Tensor) -> Tensor:
    """The embeddings of text and image that CLIP computes."""
    output = model(**inputs)
    return torch.cat([output.text_embeds, output.image_embeds])


def question_about_an_image() -> dict[str, Tensor]:
    """Text with as many image tokens as the picture has patches."""
    row = torch.tensor([1, *[IMAGE_TOKEN] * 4, 9, 17, 25, 33, 41])
    return {"input_ids": row.repeat(3, 1), "pixel_values": images()}


def question_about_patches() -> dict[str, Tensor]:
    """One picture of 4 x 4 patches, merged in blocks of 2 x 2, in a row of text."""
    start, end = 5, 6
    row = torch.tensor([[1, start, *[IMAGE_TOKEN] * 4, end, 17, 25, 33]])
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": row,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (row == IMAGE_TOKEN).long(),
    }


SENSES = [
    Architecture(
        "ViT",
        "vision",
        hugging_face("ViTForImageClassification", "ViTConfig", **TOWER, **CLASSES),
        IMAGES,
        left_out={
            "*.patch_embeddings.*": PATCHES,
            "*.position_embeddings": POSITIONS,
            "*.cls_token": "a learnt token",
            "classifier.*": HEAD,
        },
    ),
    Architecture(
        "Swin",
        "vision",
        hugging_face(
            "SwinForImageClassification", "SwinConfig", image_size=16, patch_size=2, embed_dim=16, depths=[1, 1],
            num_heads=[2, 4], window_size=2, **CLASSES,
        ),
        IMAGES,
        left_out={
            "*.patch_embeddings.*": PATCHES,
            "*.relative_position_bias_table": POSITIONS,
            "classifier.*": HEAD,
        },
    ),
    Architecture(
        "ConvNeXt",
        "vision",
        hugging_face(
            "ConvNextForImageClassification", "ConvNextConfig", image_size=16, patch_size=2, depths=[1, 1],
            hidden_sizes=[16, 32], num_stages=2, layer_scale_init_value=0.5, **CLASSES,
        ),
        IMAGES,
        left_out={"*.patch_embeddings.*": PATCHES, "classifier.*": HEAD},
        peft="no: PEFT computes grouped convolutions otherwise",
        save_warns=NO_EQUAL,
    ),
    Architecture(
        "ResNet",
        "vision",
        hugging_face(
            "ResNetForImageClassification", "ResNetConfig", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2],
            layer_type="basic", **CLASSES,
        ),
        IMAGES,
        left_out={"classifier.*": HEAD, "*.embedder.embedder.*": PATCHES},
    ),
    Architecture(
        "CLIP",
        "multimodal",
        hugging_face(
            "CLIPModel", "CLIPConfig", projection_dim=16, vision_config=TOWER,
            text_config=SHAPE,
        ),
        tokens(pixel_values=images),
        output=both_embeddings,
        left_out={
            "*.patch_embedding.*": PATCHES,
            "*.position_embedding.*": POSITIONS,
            "*.token_embedding.*": TABLE,
        },
    ),
    Architecture(
        "Whisper",
        "audio",
        hugging_face(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=VOCAB, d_model=32, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=12, max_target_positions=12, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        ),
        lambda: noise(3, 8, 24, name="input_features")() | {"decoder_input_ids": tokens(length=5)()["input_ids"]},
        left_out={"*.embed_tokens.*": TIED, "*.embed_positions.*": POSITIONS},
        peft="no: Whisper asks its convolutions for their stride, which PEFT's layers do not tell",
    ),
    Architecture(
        "Wav2Vec2",
        "audio",
        hugging_face(
            "Wav2Vec2ForCTC", "Wav2Vec2Config", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=48, conv_dim=[8, 8], conv_stride=[4, 2], conv_kernel=[8, 3],
            num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, pad_token_id=0,
        ),
        noise(3, 160, name="input_values"),
        left_out={"lm_head.*": HEAD, "*.pos_conv_embed.*": POSITIONS},
    ),
    Architecture(
        "WavLM",
        "audio",
        hugging_face(
            "WavLMForCTC",
            "WavLMConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=[8, 8],
            conv_stride=[4, 2],
            conv_kernel=[8, 3],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            pad_token_id=0,
        ),
        noise(3, 160, name="input_values"),
        left_out={
            "*.attention.*_proj.weight": UNCALLED,
            "lm_head.*": HEAD,
            "*.pos_conv_embed.*": POSITIONS,
            "*.rel_attn_embed.*": POSITIONS,
            "*.gru_rel_pos_const": "a gate of positions",
        },
        exclude={"*.attention.*_proj": UNCALLED},
    ),
    Architecture(
        "LLaVA",
        "multimodal",
        hugging_face(
            "LlavaForConditionalGeneration", "LlavaConfig",
            vision_config=TOWER | {"model_type": "clip_vision_model"},
            text_config=GROUPED | {"model_type": "llama"},
            image_token_index=IMAGE_TOKEN, vision_feature_layer=-1,
        ),
        question_about_an_image,
        left_out=LLAMA_LIKE | {"*.patch_embedding.*": PATCHES, "*.position_embedding.*": POSITIONS},
    ),
    Architecture(
        "Qwen2-VL",
        "multimodal",
        hugging_face(
            "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
            text_config=GROUPED | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
                           "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
            image_token_id=IMAGE_TOKEN, vision_start_token_id=5, vision_end_token_id=6,
        ),
        question_about_patches,
        left_out=LLAMA_LIKE | {"*.patch_embed.*": PATCHES},
    ),
]  # fmt: skip

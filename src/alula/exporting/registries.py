"""What vLLM and llama.cpp take, as they publish it: names of classes, read at the dates below.

Both lists grow; a class that is missing here may be there by now. What is listed are the decoders and image hosts that
alula builds or supports (docs/supported.md), not all that the engines know.
"""

from __future__ import annotations

VLLM_SOURCE = "vLLM's list of supported models, model_executor/models/registry.py and llava.py, read 2026-11-28"

VLLM_TEXT = frozenset(
    {
        *("ApertusForCausalLM", "ArceeForCausalLM", "BambaForCausalLM", "BloomForCausalLM", "Cohere2ForCausalLM"),
        *("CohereForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Dots1ForCausalLM"),
        *("Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "FalconForCausalLM"),
        *("FalconH1ForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM"),
        *("GPTJForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3nForCausalLM"),
        *("GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "GlmForCausalLM", "GptOssForCausalLM"),
        *("GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM"),
        *("GraniteMoeSharedForCausalLM", "HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "Jais2ForCausalLM"),
        *("JambaForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "Llama4ForCausalLM", "LlamaForCausalLM"),
        *("LongcatFlashForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "MiniMaxForCausalLM"),
        *("MistralForCausalLM", "MixtralForCausalLM", "MptForCausalLM", "NemotronForCausalLM", "OPTForCausalLM"),
        *("Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "OlmoeForCausalLM", "PersimmonForCausalLM"),
        *("Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM"),
        *("Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "SeedOssForCausalLM", "StableLmForCausalLM"),
        *("Starcoder2ForCausalLM", "Zamba2ForCausalLM"),
    }
)
VLLM_IMAGES = frozenset(
    {
        *("AriaForConditionalGeneration", "AyaVisionForConditionalGeneration", "ChameleonForConditionalGeneration"),
        *("Cohere2VisionForConditionalGeneration", "Gemma3ForConditionalGeneration", "Gemma3nForConditionalGeneration"),
        *("Glm4vForConditionalGeneration", "Glm4vMoeForConditionalGeneration", "Idefics3ForConditionalGeneration"),
        *("InternVLForConditionalGeneration", "LightOnOCRForConditionalGeneration", "Llama4ForConditionalGeneration"),
        *("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"),
        *("LlavaNextVideoForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"),
        *("Mistral3ForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
        *("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
        *("Qwen3VLMoeForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    }
)
VLLM_LLAVA_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model", "pixtral"})
VLLM_ACTIVATIONS = frozenset(
    {"gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "quick_gelu", "tanh", "sigmoid"}
)

LLAMA_CPP_SOURCE = "llama.cpp's convert_hf_to_gguf.py (conversion/), read 2026-11-28"

LLAMA_CPP_TEXT = frozenset(
    {
        *("ApertusForCausalLM", "ArceeForCausalLM", "BambaForCausalLM", "BloomForCausalLM", "Cohere2ForCausalLM"),
        *("CohereForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Dots1ForCausalLM"),
        *("Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "FalconForCausalLM"),
        *("FalconH1ForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM"),
        *("GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3nForCausalLM", "GemmaForCausalLM"),
        *("Glm4ForCausalLM", "Glm4MoeForCausalLM", "GlmForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM"),
        *("GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM"),
        *("HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM", "Jais2ForCausalLM", "JambaForCausalLM"),
        *("Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "Llama4ForCausalLM", "LlamaForCausalLM", "Mamba2ForCausalLM"),
        *("MambaForCausalLM", "Ministral3ForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
        *("NemotronForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoForCausalLM", "OlmoeForCausalLM"),
        *("Phi3ForCausalLM", "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM"),
        *("Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM"),
        *("StableLmForCausalLM", "Starcoder2ForCausalLM"),
    }
)
LLAMA_CPP_WHOLE = frozenset(
    {
        *("Gemma3ForConditionalGeneration", "Gemma3nForConditionalGeneration", "Glm4vForConditionalGeneration"),
        *("Glm4vMoeForConditionalGeneration", "Llama4ForConditionalGeneration", "Mistral3ForConditionalGeneration"),
        *("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
        *("Qwen3VLMoeForConditionalGeneration",),
    }
)
"""image hosts whose own class the text half of the script knows; of others it takes the decoder's (text_config)"""
LLAMA_CPP_IMAGES = LLAMA_CPP_WHOLE | {
    *("Idefics3ForConditionalGeneration", "LightOnOCRForConditionalGeneration", "LlavaForConditionalGeneration"),
    *("SmolVLMForConditionalGeneration", "Lfm2VlForConditionalGeneration"),
}
"""of which ``--mmproj`` writes the tower and the projector; of LLaVA only with a Pixtral tower"""
LLAMA_CPP_LLAVA_TOWERS = frozenset({"pixtral"})
LLAMA_CPP_OLDER = "tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py"
LLAMA_CPP_OLDER_TOWERS = frozenset({"clip_vision_model", "siglip_vision_model"})
"""of LLaVA, that this older script has options for (read 2026-11-29); whether what it writes is right is not known"""
LLAMA_CPP_ROPES = frozenset({"default", "linear", "yarn", "su", "longrope", "dynamic", "llama3"})
LLAMA_CPP_SENTENCEPIECE = frozenset({"GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"})
"""decoders whose vocabulary it reads from tokenizer.model alone"""

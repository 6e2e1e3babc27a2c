"""One file for each family of models (`models/family.py`), by the class that a pipeline's model_index.json names."""

BUILT_IN = {
    "StableDiffusion3Pipeline": "dgpo_fast.models.families.sd3:SD3",
    "FluxPipeline": "dgpo_fast.models.families.flux1:Flux1",
    "Flux2KleinPipeline": "dgpo_fast.models.families.flux2:Flux2Klein",
    "Flux2Pipeline": "dgpo_fast.models.families.flux2:Flux2",
    "QwenImagePipeline": "dgpo_fast.models.families.qwen_image:QwenImage",
    "ZImagePipeline": "dgpo_fast.models.families.z_image:ZImage",
    "SanaPipeline": "dgpo_fast.models.families.sana:Sana",
    "ChromaPipeline": "dgpo_fast.models.families.chroma:Chroma",
    "Lumina2Pipeline": "dgpo_fast.models.families.lumina2:Lumina2",
    "AuraFlowPipeline": "dgpo_fast.models.families.auraflow:AuraFlow",
}

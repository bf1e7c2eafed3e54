"""How do transformers' Auto classes learn about this model? By importing this module."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from vlm.configuration import VlmConfig
from vlm.image_processing import VlmImageProcessor
from vlm.modeling import VlmForConditionalGeneration
from vlm.processing import VlmProcessor

AutoConfig.register(VlmConfig.model_type, VlmConfig, exist_ok=True)
AutoImageProcessor.register(
    VlmConfig,
    image_processor_classes={"pil": VlmImageProcessor, "torchvision": VlmImageProcessor},
    exist_ok=True,
)
AutoProcessor.register(VlmConfig, VlmProcessor, exist_ok=True)
AutoModelForImageTextToText.register(VlmConfig, VlmForConditionalGeneration, exist_ok=True)

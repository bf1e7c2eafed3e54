"""How do transformers' Auto classes learn about our models? By importing this module."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from vlm.configuration import VlmConfig
from vlm.image_processing import VlmImageProcessor
from vlm.image_text_model import ImageTextConfig, ImageTextModel
from vlm.image_text_processing import ImageTextProcessor
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

AutoConfig.register(ImageTextConfig.model_type, ImageTextConfig, exist_ok=True)
AutoProcessor.register(ImageTextConfig, ImageTextProcessor, exist_ok=True)
AutoModel.register(ImageTextConfig, ImageTextModel, exist_ok=True)

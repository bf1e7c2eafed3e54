"""What does the page say, in English and in Chinese? One dict per language, with the same keys."""

from collections.abc import Mapping

ENGLISH: Mapping[str, str] = {
    # the page
    "ask": "Ask about a picture",
    "greeting": "## Show a picture, ask about it\n"
    "Drag it here, paste it, or take one with the camera. Or try one of these:",
    "sample_count": "How many are yellow?",
    "sample_depth": "Which one is nearer?",
    "sample_relation": "Left or right of the ball?",
    "sample_describe": "What is in the picture?",
    "conversation": "Conversation",
    "settings": "### Settings",
    "system": "System prompt",
    "system_info": "Counts from the next new chat on.",
    "temperature": "Temperature",
    "temperature_info": "0 takes the likeliest word each time.",
    "top_p": "Top-p",
    "longest": "Longest reply, in tokens",
    "beams": "Beams",
    "beams_info": "Above 1 the reply comes in one piece, when it is finished.",
    "new_chat": "New chat",
    "camera": "Camera",
    # said by the server
    "picture": "Picture",
    "file_too_large": "{name} is larger than the {limit} MB that are taken.",
    "too_many_pixels": "{name} has more than the {limit} million pixels that are taken.",
    "no_picture": "{name} is no picture that can be read (PNG, JPEG, WebP, GIF, BMP, TIFF).",
    "too_many_pictures": "A conversation can have {limit} pictures; begin a new chat.",
    "question_too_long": "The question has more than {limit} characters; shorten it.",
    "no_question": "Write a question first.",
    "still_answering": "Wait for the reply, or stop it.",
    "foreign_page": "This request does not come from the demo's own page.",
    "foreign_file": "Only uploaded files can be used.",
    "no_such_page": "There is no such page.",
    "too_often": "More than {limit} requests in a minute; wait a little.",
    "upload_too_large": "These files together are larger than the {limit} MB that are taken.",
    "disk_full": "There is no room for more files now; try again later.",
    "queue_full": "Too many people are asking right now; try again in a minute.",
    "too_many_visitors": "Too many people are here right now; try again later.",
    "gone": "This conversation is no longer there; begin a new chat.",
    "our_fault": "Something went wrong on the server; its log says what. Try again.",
}

CHINESE: Mapping[str, str] = {
    "ask": "就图片提问",
    "greeting": "## 给一张图片，提一个问题\n"
    "把图片拖到这里、粘贴，或用相机拍一张。也可以先试试这些：",
    "sample_count": "有几个黄色物体？",
    "sample_depth": "哪一个更近？",
    "sample_relation": "在球的左边还是右边？",
    "sample_describe": "图中有什么？",
    "conversation": "对话",
    "settings": "### 设置",
    "system": "系统提示",
    "system_info": "从下一次新对话起生效。",
    "temperature": "温度",
    "temperature_info": "0 表示每次都取最可能的词。",
    "top_p": "Top-p",
    "longest": "回复的最大长度（词元）",
    "beams": "束宽",
    "beams_info": "大于 1 时，回复完成后一次性显示。",
    "new_chat": "新对话",
    "camera": "相机",
    "picture": "图片",
    "file_too_large": "{name} 超过了 {limit} MB 的上限。",
    "too_many_pixels": "{name} 超过了 {limit} 百万像素的上限。",
    "no_picture": "{name} 不是可读取的图片（PNG、JPEG、WebP、GIF、BMP、TIFF）。",
    "too_many_pictures": "一次对话最多 {limit} 张图片；请开始新对话。",
    "question_too_long": "问题超过 {limit} 个字符；请缩短。",
    "no_question": "请先写下问题。",
    "still_answering": "请等待回复，或将其停止。",
    "foreign_page": "该请求不是来自本演示页面。",
    "foreign_file": "只能使用已上传的文件。",
    "no_such_page": "没有这个页面。",
    "too_often": "一分钟内的请求超过 {limit} 次；请稍等。",
    "upload_too_large": "这些文件合计超过了 {limit} MB 的上限。",
    "disk_full": "目前没有空间存放更多文件；请稍后再试。",
    "queue_full": "现在提问的人太多；请过一分钟再试。",
    "too_many_visitors": "现在访客太多；请稍后再试。",
    "gone": "这个对话已不存在；请开始新对话。",
    "our_fault": "服务器出错，日志中有说明。请重试。",
}

LANGUAGES: Mapping[str, Mapping[str, str]] = {"en": ENGLISH, "zh": CHINESE}


def language_of(accepted: str | None) -> str:
    """Return the language of a browser's `Accept-Language` header: Chinese if it asks for it."""
    first = (accepted or "").split(",")[0].strip().lower()
    return "zh" if first.startswith("zh") else "en"


def say(language: str, key: str, **values: object) -> str:
    """Return a sentence in a language."""
    return LANGUAGES[language][key].format(**values)

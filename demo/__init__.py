"""Talking to a model in a web page; `vlm chat` does it in the terminal."""

"""How are the small base models of the quickstart made? Each alone, by a recipe that can be read.

They stand in for the published weights that a large model starts from: an encoder that saw pictures
without words, and a language model that read words without pictures.
"""

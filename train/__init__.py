"""How is a model trained? Recipes, stages, freezing, the trainer, resuming."""

"""Which of several variants of a recipe is better, and what does each cost?"""

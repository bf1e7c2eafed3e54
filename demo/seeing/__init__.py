"""What does the page show of what the model sees? Tiles, attention, boxes, likelihoods."""

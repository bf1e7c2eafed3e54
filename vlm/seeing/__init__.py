"""What does a model look at, and how does its answer come about? Places, attention, likelihoods."""

"""The demo: a small vision transformer for the scenes, its weights, and a shortcut planted in it."""

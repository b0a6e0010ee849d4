"""From a trained run to answers: export to a bundle, and queries over the bundle."""

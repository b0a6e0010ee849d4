"""Evidence for answers, from the neighbours of the source, the known answers and other facts.

Its blend with the model.
"""

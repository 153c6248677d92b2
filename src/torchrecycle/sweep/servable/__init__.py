"""The scripts that are copied as ``load.py`` beside a saved model: `torchrecycle.sweep.save`.

They are read by people who have never seen torchrecycle, and import nothing of it.
"""

"""Adaptive search: finds a mask in a space of settings for a part of what training the whole space costs.

`halving` decides which points are trained and for how long; it knows nothing of masks. `trials` makes an ordinary
variant of each point, so that its training is a cached stage like any other, and walks a search from what the store
holds or from what a flow computes; both take the same steps. `run` is the flow's way. `tables` has the
numbers of a finished search, and the words in which plan and report speak of it.
"""

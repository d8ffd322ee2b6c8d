"""What a heatmap method is, and the trace that it reads: activations, gradients and scores.

A method holds mathematics alone; the loop over pictures, the resizing, the scaling and the colours live elsewhere.
"""

"""The oracle: every definition written out in plain Python and NumPy, slow and obvious.

Select it with ``backend="reference"``. Nothing here is shared with the fast backends but the
ranks, the scaling factors and the final division, so that == between them means something.
"""

"""Predicting losses: which examples will have a large one.

Each imports those above it alone::

    loss_prediction  learning to predict a loss
    active_learning  and what to label next
    keypoints        a task to try it on: joints in drawn figures
"""

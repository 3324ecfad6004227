"""Analyses of a study's models and masks, beyond its table: where masks cut and what that did (`anatomy`), the loss
surface (`landscape`), where to mask (`layer_prediction`). Each is a stage that writes a section of the report.
"""

"""Measures what features encode about space: correspondence between views, linear probes, spatial questions.

All of it measures frozen features of frames with known cameras and depth (`scenes`), rendered by a simulator
or read from a folder. Sources: the correspondence score of VEGA-3D (arXiv 2603.19235); the questions of
VSI-Bench (arXiv 2412.14171) and ScanRefer (arXiv 1912.08830).
"""

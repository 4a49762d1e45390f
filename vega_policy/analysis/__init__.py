"""Where does a model know space? Correspondence between views, linear probes, spatial questions, pictures.

Everything here reads frozen features of frames whose cameras and depth are known (`scenes`): from the
simulators, through a function that a config names, or from a folder of posed RGB-D frames. Source of the
correspondence score: VEGA-3D, arXiv 2603.19235; of the questions' types: VSI-Bench, arXiv 2412.14171, and
ScanRefer, arXiv 1912.08830.
"""

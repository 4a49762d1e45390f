"""LeRobot datasets: opening and checking, video decoding, cached features, batches, augmentation."""

"""The policy network: observation, fusion, backbone context and action head. Imports no LeRobot."""

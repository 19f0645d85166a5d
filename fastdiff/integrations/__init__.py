"""Other projects' interfaces on fastdiff's ops. Nothing here is imported by `import fastdiff`."""

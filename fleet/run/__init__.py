"""A checked run becomes data, model and trainer; its folder, recorder, trackers and interruptions."""

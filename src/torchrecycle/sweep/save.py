def save_servable(folder, task, trunk, best):
    raise NotImplementedError

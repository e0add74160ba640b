from hypothesis import settings

settings.register_profile("imaging", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("imaging")

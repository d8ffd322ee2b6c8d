"""The async request queue between HTTP and the workers: admission, deadlines, cancellation, hand-over."""

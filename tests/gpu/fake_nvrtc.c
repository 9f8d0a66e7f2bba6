// NVRTC under another version number: FAKE_MAJOR and FAKE_MINOR. tests/gpu/fakes.py builds it.
int nvrtcVersion(int* major, int* minor) {
    *major = FAKE_MAJOR;
    *minor = FAKE_MINOR;
    return 0;
}

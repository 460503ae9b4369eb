package sys

import "testing"

func TestAtLeast(t *testing.T) {
	for _, tt := range []struct {
		release      string
		major, minor int
		want         bool
	}{
		{"6.8.0-45-generic", 6, 8, true},
		{"6.8.0-45-generic", 6, 9, false},
		{"6.10-rc1", 6, 9, true},
		{"5.15.167.4-microsoft-standard-WSL2", 6, 0, false},
		{"7.0.0", 6, 18, true},
		{"6.1+deb12", 6, 1, true},
		{"6", 5, 0, false},
		{"custom", 0, 0, false},
		{"", 0, 0, false},
	} {
		if got := atLeast(tt.release, tt.major, tt.minor); got != tt.want {
			t.Errorf("atLeast(%q, %d, %d) = %v", tt.release, tt.major, tt.minor, got)
		}
	}
	if !KernelAtLeast(2, 6) {
		t.Error("this kernel is older than 2.6")
	}
}

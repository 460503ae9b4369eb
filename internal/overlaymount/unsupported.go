//go:build !linux

package overlaymount

// Main does nothing: only Linux has what it needs.
func Main([]string) (status int, program bool) { return 0, false }

package archive

import (
	"fmt"
	"strconv"

	"github.com/layerfs/layerfs"
)

// EntryError says which entry of a stream, or which file of a tree, an error
// is about.
type EntryError struct {
	Entry string // the name as the stream has it
	Err   error  // cause; matches [layerfs.ErrLimit], [layerfs.ErrMalformed] or is of the file system
}

// Error returns, for example, `entry "usr/bin/x": mknodat: operation not permitted`.
func (e *EntryError) Error() string { return "entry " + shorten(e.Entry) + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *EntryError) Unwrap() error { return e.Err }

// shorten quotes a name and cuts what no person would read.
func shorten(name string) string {
	const most = 300
	if len(name) > most {
		return fmt.Sprintf("%s… (%d bytes)", strconv.Quote(name[:most]), len(name))
	}
	return strconv.Quote(name)
}

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %w", layerfs.ErrMalformed, fmt.Errorf(format, args...))
}

func overLimit(format string, args ...any) error {
	return fmt.Errorf("%w: %w", layerfs.ErrLimit, fmt.Errorf(format, args...))
}

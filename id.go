package layerfs

import "fmt"

// MaxIDLength is the length in bytes of the longest layer id.
const MaxIDLength = 128

// CheckID returns nil if id can name a layer: [A-Za-z0-9][A-Za-z0-9_.-]{0,127}.
// Drivers call it before they build any path from an id. The error matches
// [ErrInvalidID].
func CheckID(id string) error {
	switch {
	case id == "":
		return fmt.Errorf("%w: empty", ErrInvalidID)
	case len(id) > MaxIDLength:
		return fmt.Errorf("%w: %d bytes, more than %d", ErrInvalidID, len(id), MaxIDLength)
	}
	for i := range len(id) {
		c := id[i]
		alnum := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !alnum && (i == 0 || c != '_' && c != '.' && c != '-') {
			return fmt.Errorf("%w: %q has %q at byte %d", ErrInvalidID, id, c, i)
		}
	}
	return nil
}

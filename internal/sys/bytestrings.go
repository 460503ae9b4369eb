package sys

import "encoding/json"

// ByteStrings are strings that need not be UTF-8, such as paths and arguments.
// In JSON, whose strings are UTF-8, they are as [][]byte is.
type ByteStrings []string

// MarshalJSON implements json.Marshaler.
func (s ByteStrings) MarshalJSON() ([]byte, error) {
	var w [][]byte
	for _, e := range s {
		w = append(w, []byte(e))
	}
	return json.Marshal(w)
}

// UnmarshalJSON implements json.Unmarshaler.
func (s *ByteStrings) UnmarshalJSON(b []byte) error {
	var w [][]byte
	err := json.Unmarshal(b, &w)
	*s = nil
	for _, e := range w {
		*s = append(*s, string(e))
	}
	return err
}

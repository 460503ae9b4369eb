package overlay

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/layerfs/layerfs"
)

// config is what the layers of a root have in common for ever, because they
// were written so: .layerfs/overlay.json.
type config struct {
	Xattrs   string `json:"xattrs"`             // trusted or user
	Redirect bool   `json:"redirect,omitempty"` // redirects may occur
	Metacopy bool   `json:"metacopy,omitempty"` // metacopy files may occur
	Volatile bool   `json:"volatile,omitempty"` // layers may have been mounted volatile
	AUFS     bool   `json:"aufs,omitempty"`     // a mount program may have made AUFS whiteouts
	Union    bool   `json:"union,omitempty"`    // package union may have left names of its own
}

func configPath(home string) string { return filepath.Join(home, ".layerfs", "overlay.json") }

// loadConfig merges what the root has with what the options want and writes it
// back if that is more. Two processes that open a new root at once write the
// same or are told apart by the next opening.
func loadConfig(home string, want config) (config, error) {
	path := configPath(home)
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return want, saveConfig(path, want)
	case err != nil:
		return config{}, err
	}
	var have config
	if err := json.Unmarshal(b, &have); err != nil {
		return config{}, fmt.Errorf("%s: %w", path, err)
	}
	if have.Xattrs != want.Xattrs {
		return config{}, &layerfs.UnsupportedError{
			Feature: "overlay with " + want.Xattrs + " xattrs on this root",
			Reason:  "its layers were written with " + have.Xattrs + " xattrs",
		}
	}
	merged := config{
		Xattrs:   have.Xattrs,
		Redirect: have.Redirect || want.Redirect,
		Metacopy: have.Metacopy || want.Metacopy,
		Volatile: have.Volatile || want.Volatile,
		AUFS:     have.AUFS || want.AUFS,
		Union:    have.Union || want.Union,
	}
	if merged == have {
		return merged, nil
	}
	return merged, saveConfig(path, merged)
}

func saveConfig(path string, c config) error {
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	temp := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.WriteFile(temp, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

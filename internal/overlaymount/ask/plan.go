package ask

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/layerfs/layerfs/internal/sys"
)

// Self is the program that runs, even if its file was replaced or removed.
const Self = "/proc/self/exe"

// Plan is a mount as the command line describes it.
type Plan struct {
	Target    string
	Lowers    []string // top first
	Upper     string   // "" for none
	UserXattr bool
	ReadOnly  bool
	NoSuid    bool
	NoDev     bool
	NoExec    bool
	Log       string // file for what the server tells once it serves, "" for none
}

// Parse reads the arguments behind the command. The error is for whoever called
// the program.
func Parse(args []string) (*Plan, error) {
	p := new(Plan)
	var options []string
	for len(args) > 0 && strings.HasPrefix(args[0], "-o") {
		list := args[0][2:]
		args = args[1:]
		if list == "" && len(args) > 0 {
			list, args = args[0], args[1:]
		}
		options = append(options, list)
	}
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	} else if len(args) > 0 && strings.HasPrefix(args[0], "-") {
		return nil, fmt.Errorf("argument %q is not -o OPTIONS", args[0])
	}
	if len(args) != 1 || args[0] == "" {
		return nil, fmt.Errorf("the arguments are -o OPTIONS TARGET, not %q behind the options", args)
	}
	p.Target = args[0]
	work := ""
	for _, list := range options {
		for _, opt := range split(list, ',') {
			if err := p.set(opt, &work); err != nil {
				return nil, err
			}
		}
	}
	switch {
	case len(p.Lowers) == 0:
		return nil, errors.New("option lowerdir is missing")
	case work != "" && p.Upper == "":
		return nil, errors.New("option workdir needs upperdir")
	}
	return p, nil
}

// set takes one option.
func (p *Plan) set(opt string, work *string) (err error) {
	key, value, _ := strings.Cut(opt, "=")
	switch key {
	case "lowerdir":
		p.Lowers = nil
		for _, dir := range split(value, ':') {
			lower, err := unescape(key, dir)
			if err != nil {
				return err
			}
			p.Lowers = append(p.Lowers, lower)
		}
		return nil
	case "upperdir":
		p.Upper, err = unescape(key, value)
		return err
	case "workdir":
		*work, err = unescape(key, value)
		return err
	}
	switch opt {
	case "", "allow_other", "default_permissions":
	case "userxattr":
		p.UserXattr = true
	case "ro", "rw":
		p.ReadOnly = opt == "ro"
	case "suid", "nosuid":
		p.NoSuid = opt == "nosuid"
	case "dev", "nodev":
		p.NoDev = opt == "nodev"
	case "exec", "noexec":
		p.NoExec = opt == "noexec"
	default:
		return fmt.Errorf("option %q is not known", opt)
	}
	return nil
}

// split cuts a list at a separator that is not behind a backslash, and leaves
// the backslashes.
func split(list string, sep byte) []string {
	var parts []string
	start := 0
	for i := 0; i < len(list); i++ {
		switch list[i] {
		case '\\':
			i++
		case sep:
			parts = append(parts, list[start:i])
			start = i + 1
		}
	}
	return append(parts, list[start:])
}

// unescape takes one level of backslashes away from the path of an option.
func unescape(key, s string) (string, error) {
	if s == "" {
		return "", fmt.Errorf("option %s names no directory", key)
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' {
			if i++; i == len(s) {
				return "", fmt.Errorf("option %s: path %q ends in a backslash", key, s)
			}
		}
		b.WriteByte(s[i])
	}
	return b.String(), nil
}

// absolute makes all paths absolute, as the server has another working
// directory.
func (p *Plan) absolute() (err error) {
	paths := []*string{&p.Target}
	for _, path := range []*string{&p.Upper, &p.Log} {
		if *path != "" {
			paths = append(paths, path)
		}
	}
	for i := range p.Lowers {
		paths = append(paths, &p.Lowers[i])
	}
	for _, path := range paths {
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	return nil
}

// MarshalJSON implements json.Marshaler: paths are bytes, and strings of JSON are
// not.
func (p Plan) MarshalJSON() ([]byte, error) {
	return json.Marshal(wirePlan{plainPlan(p), []byte(p.Target), []byte(p.Upper), []byte(p.Log), p.Lowers})
}

// UnmarshalJSON implements json.Unmarshaler.
func (p *Plan) UnmarshalJSON(b []byte) error {
	var w wirePlan
	err := json.Unmarshal(b, &w)
	*p = Plan(w.plainPlan)
	p.Target, p.Upper, p.Log, p.Lowers = string(w.Target), string(w.Upper), string(w.Log), w.Lowers
	return err
}

type plainPlan Plan

type wirePlan struct {
	plainPlan
	Target, Upper, Log []byte // in place of the others
	Lowers             sys.ByteStrings
}

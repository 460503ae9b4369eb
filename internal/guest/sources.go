package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// hostSources returns the apt sources of this host that are for the release
// codename and have the component main, in deb822 form, with the components
// replaced by main and contrib: the OpenZFS sources are in contrib, which a
// default system does not list. dir is /etc/apt.
//
// Format: sources.list(5), apt 2.6.
func hostSources(dir, codename string) (string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "sources.list.d", "*"))
	if err != nil {
		return "", err
	}
	var out []string
	for _, f := range append([]string{filepath.Join(dir, "sources.list")}, files...) {
		data, err := os.ReadFile(f)
		switch {
		case os.IsNotExist(err):
			continue
		case err != nil:
			return "", err
		}
		switch filepath.Ext(f) {
		case ".sources":
			out = append(out, fromDeb822(string(data), codename)...)
		case ".list":
			out = append(out, fromLines(string(data), codename)...)
		}
	}
	if len(out) == 0 {
		return "", fmt.Errorf("guest: no source for %s main in %s", codename, dir)
	}
	return strings.Join(out, "\n"), nil
}

const guestComponents = "Components: main contrib\n"

// fromDeb822 keeps the stanzas that match and everything in them but their
// components.
func fromDeb822(text, codename string) []string {
	var out []string
	var kept strings.Builder
	var typ, suites, components, disabled string
	field := ""
	flush := func() {
		types := strings.Fields(typ)
		if slices.Contains(types, "deb") && disabled != "no" && wanted(strings.Fields(suites), strings.Fields(components), codename) {
			out = append(out, "Types: deb\n"+kept.String()+guestComponents)
		}
		kept.Reset()
		typ, suites, components, disabled, field = "", "", "", "", ""
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \t\r\n")
		switch {
		case strings.TrimSpace(line) == "":
			flush()
			continue
		case line[0] == '#':
			continue
		}
		val := line
		if line[0] != ' ' && line[0] != '\t' {
			name, rest, ok := strings.Cut(line, ":")
			if !ok {
				continue
			}
			field, val = strings.ToLower(strings.TrimSpace(name)), rest
		}
		switch field {
		case "types":
			typ += " " + val
		case "components":
			components += " " + val
		case "enabled":
			disabled = strings.ToLower(strings.TrimSpace(val))
		case "suites":
			suites += " " + val
			kept.WriteString(line + "\n")
		default:
			kept.WriteString(line + "\n")
		}
	}
	flush()
	return out
}

// fromLines converts the one-line form "deb [options] uri suite component...".
func fromLines(text, codename string) []string {
	names := map[string]string{
		"arch": "Architectures", "signed-by": "Signed-By", "trusted": "Trusted",
		"check-valid-until": "Check-Valid-Until", "check-date": "Check-Date",
	}
	var out []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok {
			continue
		}
		rest = strings.TrimSpace(rest)
		extra := ""
		if opts, after, ok := strings.Cut(strings.TrimPrefix(rest, "["), "]"); ok && rest[0] == '[' {
			rest = after
			for o := range strings.FieldsSeq(opts) {
				key, val, _ := strings.Cut(o, "=")
				if n := names[strings.ToLower(key)]; n != "" {
					extra += n + ": " + strings.ReplaceAll(val, ",", " ") + "\n"
				}
			}
		}
		f := strings.Fields(rest)
		if len(f) < 3 || !wanted(f[1:2], f[2:], codename) {
			continue
		}
		out = append(out, fmt.Sprintf("Types: deb\nURIs: %s\nSuites: %s\n%s%s", f[0], f[1], extra, guestComponents))
	}
	return out
}

// wanted reports whether a source is for the release, or for its updates.
func wanted(suites, components []string, codename string) bool {
	return slices.Contains(components, "main") && slices.ContainsFunc(suites, func(s string) bool {
		return s == codename || strings.HasPrefix(s, codename+"-") || strings.HasPrefix(s, codename+"/")
	})
}
